"""Suites, which define everything that makes runs comparable."""
