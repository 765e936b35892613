"""Leaderboards for a paper: LaTeX that needs the package booktabs and no other."""

import re
import unicodedata
from collections.abc import Container, Mapping, Sequence

import pandas as pd

from kdbench.report.tables.columns import ACCURACIES, MISSING, Column
from kdbench.report.tables.notes import about, doubts

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
    """One leaderboard; in columns of accuracies the best mean is bold and the second underlined,
    as shown, so that equal ones are marked alike.
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
    caption = " ".join([caption, *map(escape, [*about(rows), *doubts(rows)])])
    return _table(caption, pd.DataFrame(cells), [column.words for column in shown])


def plain_table(
    caption: Sequence[str], cells: Sequence[Mapping[str, str]], words: Container[str]
) -> str:
    """Rows of texts under a caption of several sentences; columns of `words` stand on the left."""
    frame = pd.DataFrame([{escape(k): escape(v) for k, v in row.items()} for row in cells])
    sentences = ". ".join(escape(text.rstrip(".")) for text in caption)
    return _table(f"{sentences}.", frame, [heading in words for heading in cells[0]])


def escape(text: str) -> str:
    """Text as LaTeX; a character that pdflatex lacks without further packages is its number."""
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
    """Best and second mean, which stands first in its cell."""
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
