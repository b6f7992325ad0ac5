"""Scores of a segmentation against the truth, from one sparse contingency table."""
