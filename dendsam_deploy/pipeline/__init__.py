"""The detect-then-segment loop over a volume."""
