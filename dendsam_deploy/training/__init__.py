"""Fine-tuning of SAM and of the detector."""
