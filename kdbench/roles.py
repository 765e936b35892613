"""Names of the roles that methods predict and results contain."""

import re


def is_peer(role: str) -> bool:
    """Return True for the networks other than the student: peer0, peer1, ..."""
    return re.fullmatch(r"peer\d+", role) is not None


def is_network(role: str) -> bool:
    """Return True for the networks of a cohort, which count in ensemble and mean."""
    return role == "student" or is_peer(role)
