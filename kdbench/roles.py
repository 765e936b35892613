"""Names of roles, which methods predict and results hold."""

import re


def is_peer(role: str) -> bool:
    """Whether a role is a network beside the student: peer0, peer1, ..."""
    return re.fullmatch(r"peer\d+", role) is not None


def is_network(role: str) -> bool:
    """Whether a role is one of the cohort's networks, so that it counts in ensemble and mean."""
    return role == "student" or is_peer(role)
