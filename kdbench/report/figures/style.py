"""Style of figures, and conversion to SVG that follows the theme of the page."""

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from kdbench.atomic import atomic_write

ImageFormat = Literal["png", "svg", "pdf"]

INK, QUIET, RULE, PAPER = "#1b1d20", "#6b7076", "#d5d8db", "#fefefd"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b97f00", "#3a94c9", "#7d5fb2")
"""Colors of Okabe and Ito (2008), without yellow and with darker orange and sky blue for contrast
on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Markers. Their number is coprime to that of the colors, which gives 63 distinct pairs."""

VARIABLES = {INK: "--ink", QUIET: "--quiet", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--series-{index}" for index, colour in enumerate(PALETTE)
}
"""CSS variables of the page, by color."""

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"

RC: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kdbench",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}

PointStyle = tuple[str, str]
"""Color and marker."""


def point_styles(names: Sequence[str]) -> dict[str, PointStyle]:
    """Return the color and marker of each name."""
    return {
        name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)
    }


def visible(text: str) -> str:
    """Without control and format characters, which XML forbids or which turn what follows."""
    return "".join("\ufffd" if unicodedata.category(c) in {"Cc", "Cf", "Cs"} else c for c in text)


@contextmanager
def drawing() -> Iterator[None]:
    """Return the context in which figures are created and saved."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # Names in scripts that the font lacks show as boxes; the page uses the browser's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def inline_svg(figure: Figure, salt: str, summary: str) -> str:
    """Return a figure as SVG for an HTML page, with CSS variables as colors and unique ids."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for metadata in root.findall(f"{SVG}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _adapt(element)
    points = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("role", "img")
    root.set("aria-label", visible(summary))
    root.set("style", f"--points: {points:g}")
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element) -> None:
    element.tag = element.tag.removeprefix(SVG)
    if element.tag == "g":  # these ids are not unique across figures
        element.attrib.pop("id", None)
    if XLINK in element.attrib:
        element.set("href", element.attrib.pop(XLINK))
    if "d" in element.attrib:
        element.set("d", re.sub(r"-?\d+\.\d{3,}", _rounded, element.get("d", "")))
    if "style" in element.attrib:
        style = re.sub(r"#[0-9a-f]{6}", _variable, element.get("style", ""))
        element.set("style", re.sub(r"(font: [^;]*?px) [^;]*", r"\1 var(--sans)", style))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _variable(colour: re.Match[str]) -> str:
    name = VARIABLES.get(colour[0])
    return f"var({name})" if name else colour[0]


def save(figure: Figure, file: Path, form: ImageFormat) -> None:
    """Save a figure; equal figures give identical bytes.

    Raises:
        UserError: The file cannot be written.
    """
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=200, metadata=undated)
    with atomic_write(file, durable=False) as stream:
        stream.write(content.getvalue())
