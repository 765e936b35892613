"""Images that stay encoded on disk and are decoded by worker processes."""
