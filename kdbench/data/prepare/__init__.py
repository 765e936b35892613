"""One-time preparation of a large dataset: smaller JPEG images in Parquet shards."""
