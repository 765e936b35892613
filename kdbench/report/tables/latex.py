"""Leaderboards as LaTeX tables, which need only the package booktabs."""

import re
import unicodedata
from collections.abc import Container, Mapping, Sequence

import pandas as pd

from kdbench.report.tables.columns import ACCURACIES, MISSING, Column
from kdbench.report.tables.notes import caveats, suite_notes

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
} | {character: rf"\{character}" for character in "&%$#_{}"}


def leaderboard_table(title: str, rows: pd.DataFrame, shown: Sequence[Column], against: str) -> str:
    """Return a leaderboard as a LaTeX table.

    In columns of accuracies the best mean is bold and the second best is underlined. Means that
    are equal after rounding are marked alike.
    """
    cells = {}
    for column in shown:
        texts = [column.text(row) for _, row in rows.iterrows()]
        marked = _marked(texts) if column.name in ACCURACIES else list(map(escape, texts))
        cells[escape(column.heading)] = marked
    fewest, most = rows.n.min(), rows.n.max()
    runs = f"$n = {most}$" if fewest == most else f"$n = {fewest}$ to ${most}$"
    caption = (
        f"{escape(title)}: last epoch, mean $\\pm$ sample standard deviation over seeds, {runs}; "
        f"differences are paired by seed, against {escape(against)}."
    )
    caption = " ".join([caption, *map(escape, [*suite_notes(rows), *caveats(rows)])])
    return _table(caption, pd.DataFrame(cells), [column.words for column in shown])


def plain_table(
    caption: Sequence[str], cells: Sequence[Mapping[str, str]], words: Container[str]
) -> str:
    """Return rows of texts as a LaTeX table; the columns in `words` are left-aligned."""
    frame = pd.DataFrame([{escape(k): escape(v) for k, v in row.items()} for row in cells])
    sentences = ". ".join(escape(text.rstrip(".")) for text in caption)
    return _table(f"{sentences}.", frame, [heading in words for heading in cells[0]])


def escape(text: str) -> str:
    """Escape text for LaTeX. Characters that need further packages become their code point."""
    signed = re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)
    return "".join(_character(character) for character in signed)


def _character(character: str) -> str:
    if character in SPECIAL:
        return SPECIAL[character]
    if character == "\N{MINUS SIGN}":
        return "$-$"
    accented = "À" <= character <= "ÿ" and unicodedata.decomposition(character)
    return character if character.isascii() or accented else f"U+{ord(character):04X}"


def _marked(texts: Sequence[str]) -> list[str]:
    """Mark the best and the second best mean; each cell begins with its mean."""
    means = [text.split(" ")[0] for text in texts]
    order = sorted({float(mean) for mean in means if mean != MISSING}, reverse=True)
    marks = dict(zip(order, (r"\textbf", r"\underline"), strict=False))
    marked = []
    for text, mean in zip(texts, means, strict=True):
        mark = marks.get(float(mean)) if mean != MISSING else None
        rest = escape(text.removeprefix(mean))
        marked.append(f"{mark}{{{mean}}}{rest}" if mark else escape(text))
    return marked


def _table(caption: str, frame: pd.DataFrame, words: Sequence[bool]) -> str:
    return frame.style.hide(axis="index").to_latex(
        caption=caption,
        column_format="".join("l" if left else "r" for left in words),
        hrules=True,
        position_float="centering",
    )
