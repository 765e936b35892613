"""Suites: everything that makes runs comparable, validated, immutable and hashed."""
