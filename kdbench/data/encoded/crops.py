"""Random boxes of torchvision's RandomResizedCrop as a pure function of uniform draws.

The main process makes the draws together with the image order and sends them to the workers, so
that crops do not depend on which worker decodes an image.
"""

import math
from collections.abc import Sequence

from kdbench.data.encoded.decode import Box
from kdbench.suite.sections import RandomResizedCrop

ATTEMPTS = 10
"""Attempts at a box inside the image before the largest allowed central box is used."""

DRAWS = 2 * ATTEMPTS + 3
"""Number of uniform draws per view: area and shape of each attempt, top, left, and flip."""

FLIP = DRAWS - 1


def random_resized_box(
    height: int, width: int, draws: Sequence[float], crop: RandomResizedCrop
) -> Box:
    """Return a box inside an image of this size from DRAWS numbers in [0, 1)."""
    shapes = tuple(math.log(bound) for bound in crop.ratio)
    top, left = draws[2 * ATTEMPTS : FLIP]
    for attempt in range(ATTEMPTS):
        area = height * width * _interpolate(crop.scale, draws[2 * attempt])
        shape = math.exp(_interpolate(shapes, draws[2 * attempt + 1]))
        columns, rows = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < columns <= width and 0 < rows <= height:
            return (
                int(top * (height - rows + 1)),
                int(left * (width - columns + 1)),
                rows,
                columns,
            )
    return _central_box(height, width, crop)


def _central_box(height: int, width: int, crop: RandomResizedCrop) -> Box:
    """Return the largest centered box of an allowed shape."""
    low, high = crop.ratio
    rows, columns = height, width
    if width / height < low:
        rows = max(1, round(width / low))
    elif width / height > high:
        columns = max(1, round(height * high))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _interpolate(bounds: Sequence[float], draw: float) -> float:
    low, high = bounds
    return low + draw * (high - low)
