"""Bundles on disk: the manifest, its files and their digests."""
