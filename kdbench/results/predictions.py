"""Predictions of a run's last epoch, in a compressed NumPy file beside its result.

They answer later questions about single images without training again. The path is that of the
result with the ending `.npz`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdbench.atomic import atomic_write
from kdbench.results.files import result_path
from kdbench.results.schema import Identity

LABELS = "labels"
"""Key of the labels, which no role may have as its name."""

Predictions = Mapping[str, np.ndarray]
"""Predicted class of each test image by role, and the labels: arrays (N,) in dataset order. The
label of an image that could not be decoded is negative."""


def predictions_path(results: Path, identity: Identity) -> Path:
    """Return the path of a run's predictions."""
    return result_path(results, identity).with_suffix(".npz")


def write_predictions(results: Path, identity: Identity, predictions: Predictions) -> Path:
    """Write predictions atomically in the smallest integer types, and return their path.

    Raises:
        UnwritableError: The file cannot be written.
    """
    file = predictions_path(results, identity)
    arrays = {name: _smallest(array) for name, array in predictions.items()}
    with atomic_write(file) as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return file


def read_predictions(results: Path, identity: Identity) -> dict[str, np.ndarray] | None:
    """Return the predictions of a run; None if there are none.

    Raises:
        ValueError: The file is damaged.
    """
    file = predictions_path(results, identity)
    try:
        with np.load(file) as archive:
            return dict(archive)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged archive
        raise ValueError(f"'{file}' is not valid: {error}") from error


def _smallest(array: np.ndarray) -> np.ndarray:
    types = (np.uint8, np.uint16, np.int64)
    fits = (t for t in types if array.min() >= np.iinfo(t).min and array.max() <= np.iinfo(t).max)
    return array.astype(next(fits))
