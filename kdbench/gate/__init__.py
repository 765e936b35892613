"""The `kdbench gate` command: compares a short training schedule with a stored baseline, for CI."""
