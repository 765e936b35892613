"""The network that a run deploys, as a file of its own, and that file measured again."""
