"""Volumes on disk, read and written slice by slice."""
