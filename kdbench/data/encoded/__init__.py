"""Datasets whose images stay encoded on disk and are decoded by worker processes."""
