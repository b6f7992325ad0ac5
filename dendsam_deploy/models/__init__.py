"""The torch modules that are exported: SAM, its box decoder, the detector, and their weights."""
