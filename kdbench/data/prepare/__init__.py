"""The one-time preparation of a large data set: smaller JPEG images in Parquet shards."""
