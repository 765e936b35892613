"""Export of the network that a run deploys, and evaluation of exported files."""
