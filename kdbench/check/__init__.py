"""The `kdbench check` command: contract tests that apply to every method."""
