"""Locating datasets in a folder or on the hub, and reading their images."""
