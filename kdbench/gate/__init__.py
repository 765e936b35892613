"""Comparison of a short schedule with a stored baseline, for CI."""
