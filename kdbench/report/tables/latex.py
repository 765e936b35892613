"""Leaderboards as LaTeX tables, which need only the package booktabs."""

import re
import unicodedata
from collections.abc import Container, Mapping, Sequence

import pandas as pd

from kdbench.report.tables.columns import Column
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
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "≈": r"$\approx$",
} | {character: rf"\{character}" for character in "&%$#_{}"}


def leaderboard_table(title: str, rows: pd.DataFrame, shown: Sequence[Column], against: str) -> str:
    """Return a leaderboard as a LaTeX table.

    The students that do not differ significantly from the best one are bold, if others do.
    """
    cells = {}
    for column in shown:
        texts = [column.text(row) for _, row in rows.iterrows()]
        bold = rows.among_best.eq(True) if column.name == "top1" else [False] * len(rows)
        cells[escape(column.heading)] = list(map(_cell, texts, bold))
    fewest, most = rows.n.min(), rows.n.max()
    runs = f"$n = {most}$" if fewest == most else f"$n = {fewest}$ to ${most}$"
    caption = (
        f"{escape(title)}: last epoch, mean $\\pm$ sample standard deviation over seeds, {runs}; "
        f"differences are paired by seed, against {escape(against)}."
    )
    if rows.among_best.eq(True).any():
        caption += " Bold: not distinguishable from the best mean."
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


def _cell(text: str, bold: bool) -> str:
    """Return a cell, whose mean, the text before the first space, may be bold."""
    mean, space, rest = text.partition(" ")
    return rf"\textbf{{{escape(mean)}}}{escape(space + rest)}" if bold else escape(text)


def _table(caption: str, frame: pd.DataFrame, words: Sequence[bool]) -> str:
    return frame.style.hide(axis="index").to_latex(
        caption=caption,
        column_format="".join("l" if left else "r" for left in words),
        hrules=True,
        position_float="centering",
    )
