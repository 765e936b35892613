"""Data sets in a folder or on the hub: locating them and reading their images."""
