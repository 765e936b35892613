"""Damaged files are refused or read right; `--hypothesis-profile thorough` draws 2,000 of each."""

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import torch
from encoded_data import CLASSES, TEST, opened, photo, photo_suite, write_parquet
from hypothesis import given
from made_results import committed

from kdbench.data.encoded.decode import UndecodableError, decode, decode_center
from kdbench.engine import checkpoint
from kdbench.errors import UserError
from kdbench.paths import SUITES
from kdbench.results.files import DamagedFile, read_result, write_result
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

MADE = committed("ffsd")
ACCURACY = re.compile(r'"top[15]": ([\d.]+)')


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw damage: bytes overwritten, removed, duplicated or inserted, or truncation."""
    place, fill = st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)
    kind = st.sampled_from(["overwrite", "cut", "double", "insert", "end"])
    edits = draw(st.lists(st.tuples(place, kind, fill), min_size=1, max_size=4))

    def damage(content: bytes) -> bytes:
        for share, kind, fill in edits:
            place, size = int(share * len(content)), len(fill)
            before, after = content[:place], content[place:]
            content = {
                "overwrite": before + fill + after[size:],
                "cut": before + after[size:],
                "double": before + after[:size] + after,
                "insert": before + fill + after,
                "end": before,
            }[kind]
        return content

    return damage


@contextlib.contextmanager
def may_be_refused(kind: type[Exception]) -> Iterator[None]:
    """Context in which a file is read; the reader may only raise a clear error."""
    try:
        yield
    except kind as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000


@given(damages())
def test_a_suite_file(damage):
    Path("damaged.toml").write_bytes(damage((SUITES / "cifar100.toml").read_bytes()))
    with may_be_refused(UserError):
        suite = load_suite("damaged.toml")
        assert isinstance(suite, Suite) and suite.total_steps > 0


def check_result(file: Path) -> None:
    found = read_result(file)
    if isinstance(found, DamagedFile):
        assert found.reason and "Traceback" not in found.reason
    else:  # what was damaged is a free text, or a digit of what no table shows as an accuracy
        assert found.identity == MADE.identity
        assert (found.last, found.best_on_test) == (MADE.last, MADE.best_on_test)


@given(damages())
def test_a_result(damage):
    file = write_result(Path("results"), MADE)
    file.write_bytes(damage(file.read_bytes()))
    check_result(file)


@given(share=st.floats(0, 1, exclude_max=True), digit=st.sampled_from("0123456789"))
def test_no_digit_of_an_accuracy_changes_unnoticed(share, digit):
    file = write_result(Path("results"), MADE)
    text = file.read_text()
    places = [place for found in ACCURACY.finditer(text) for place in range(*found.span(1))]
    place = places[int(share * len(places))]
    file.write_text(text[:place] + digit + text[place + 1 :])
    check_result(file)


@cache
def whole_checkpoint() -> bytes:
    content = {"fingerprint": "0", "method": {"weight": torch.rand(100)}, "optimizers": []}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@given(damages())
def test_a_checkpoint(damage):
    file, damaged = Path("checkpoint-000000001.pt"), damage(whole_checkpoint())
    file.write_bytes(damaged)
    found = checkpoint._read(file, torch.device("cpu"))
    assert (found is not None) is (damaged == whole_checkpoint())


@given(damage=damages(), index=st.integers(0, 30))
def test_an_image(damage, index):
    encoded = damage(photo("train", index))
    with may_be_refused(UndecodableError):
        pixels = decode(encoded)
        assert pixels.dtype == torch.uint8 and pixels.dim() == 3 and pixels.shape[2] == 3
        assert decode_center(encoded, 36, 32).shape == (32, 32, 3)


@given(damage=damages())
def test_a_parquet_shard(damage, tmp_path_factory):
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
