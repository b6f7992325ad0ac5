"""Judges: parity of graphs, scores of label volumes."""
