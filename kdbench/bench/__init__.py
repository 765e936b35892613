"""Benchmark of the time and memory that a training step takes."""
