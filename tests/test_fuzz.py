"""Damaged files give a clear error or a correct result.

The default draws a few of each kind; `--hypothesis-profile thorough` draws 2,000.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from encoded_data import CLASSES, TEST, opened, photo, photo_suite, write_parquet
from hypothesis import given
from made_results import committed

from kdbench.data.encoded.decode import UndecodableError, decode, decode_center
from kdbench.engine import checkpoint
from kdbench.errors import UserError
from kdbench.paths import SUITES
from kdbench.results.files import DamagedFile, read_result, write_result
from kdbench.results.schema import Result
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

Damage = Callable[[bytes], bytes]
ACCURACY = re.compile(r'"top[15]": ([\d.]+)')


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Draw damage: bytes overwritten, removed, duplicated or inserted, or truncation."""
    edits = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1, exclude_max=True),
                st.sampled_from(["overwrite", "cut", "double", "insert", "end"]),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def damage(content: bytes) -> bytes:
        for share, kind, fill in edits:
            place, size = int(share * len(content)), len(fill)
            before, after = content[:place], content[place:]
            match kind:
                case "overwrite":
                    content = before + fill + after[size:]
                case "cut":
                    content = before + after[size:]
                case "double":
                    content = before + after[:size] + after
                case "insert":
                    content = before + fill + after
                case "end":
                    content = before
        return content

    return damage


@contextlib.contextmanager
def may_be_refused(kind: type[Exception]) -> Iterator[None]:
    """Context in which a file is read; the reader may only raise a clear error."""
    try:
        yield
    except kind as error:
        check_sentence(error)


def check_sentence(error: Exception) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 2000


@given(damages())
def test_a_suite_file(damage):
    whole = (SUITES / "cifar100.toml").read_bytes()
    Path("damaged.toml").write_bytes(damage(whole))
    with may_be_refused(UserError):
        suite = load_suite("damaged.toml")
        assert isinstance(suite, Suite) and suite.total_steps > 0


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[Path, bytes, Result]:
    made = committed("ffsd")
    file = write_result(tmp_path_factory.mktemp("results"), made)
    return file, file.read_bytes(), made


@given(damage=damages())
def test_a_result(result, damage):
    file, whole, made = result
    file.write_bytes(damage(whole))
    found = read_result(file)
    if isinstance(found, DamagedFile):
        assert found.reason and "Traceback" not in found.reason
    else:  # what was damaged is a free text, or a digit of what no table shows as an accuracy
        assert found.identity == made.identity
        assert (found.last, found.best_on_test) == (made.last, made.best_on_test)


@given(share=st.floats(0, 1, exclude_max=True), digit=st.sampled_from("0123456789"))
def test_no_digit_of_an_accuracy_changes_unnoticed(result, share, digit):
    file, whole, made = result
    text = whole.decode()
    places = [place for found in ACCURACY.finditer(text) for place in range(*found.span(1))]
    place = places[int(share * len(places))]
    file.write_text(text[:place] + digit + text[place + 1 :])
    found = read_result(file)
    if isinstance(found, Result):  # the digit that was there, or one of an epoch that was neither
        assert (found.last, found.best_on_test) == (made.last, made.best_on_test)


@pytest.fixture(scope="module")
def made_checkpoint(tmp_path_factory) -> tuple[Path, bytes]:
    content = {"fingerprint": "0", "method": {"weight": torch.rand(100)}, "optimizers": []}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    whole = hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
    return tmp_path_factory.mktemp("run") / "checkpoint-000000001.pt", whole


@given(damage=damages())
def test_a_checkpoint(made_checkpoint, damage):
    file, whole = made_checkpoint
    damaged = damage(whole)
    file.write_bytes(damaged)
    found = checkpoint._read(file, torch.device("cpu"))
    assert (found is not None) is (damaged == whole)


@given(damage=damages(), index=st.integers(0, 30))
def test_an_image(damage, index):
    encoded = damage(photo("train", index))
    with may_be_refused(UndecodableError):
        pixels = decode(encoded)
        assert pixels.dtype == torch.uint8 and pixels.dim() == 3 and pixels.shape[2] == 3
        assert decode_center(encoded, 36, 32).shape == (32, 32, 3)


@given(damage=damages())
def test_a_parquet_shard(damage, tmp_path_factory):
    """Open a shard, and read and decode every image."""
    suite = photo_suite()
    folder = write_parquet(tmp_path_factory.mktemp("data"))
    shard = folder / "validation-00000-of-00001.parquet"
    shard.write_bytes(damage(shard.read_bytes()))
    with may_be_refused(UserError):
        _, test = opened(suite, folder)
        assert len(test) == TEST and 0 <= test.labels.min() <= test.labels.max() < CLASSES
        for row in range(TEST):
            with may_be_refused(UndecodableError):
                assert decode(test.read(row)).dtype == torch.uint8
