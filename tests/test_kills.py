"""The short form of `python tests/reliability/kills.py`."""

import random

import pytest
from reliability.kills import harm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["baseline", "ffsd"])
def test_a_run_killed_at_any_moment_equals_an_uninterrupted_run(tmp_path, method):
    command = ["run", "--suite", "tiny.toml", "--methods", method]
    done = harm(command, 3, tmp_path, random.Random(0), processes=1)
    assert done.kills >= 3 and done.finished == done.equal > 0 and done.damaged == 0
