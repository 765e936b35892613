"""Results on disk: their schema, reading and writing."""
