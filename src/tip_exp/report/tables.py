"""A table of text and what it becomes: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_LATEX |= {"±": r"$\pm$", "−": "$-$", "ρ": r"$\rho$", "Δ": r"$\Delta$", "<": "$<$", ">": "$>$"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings. `best` marks cells (row, column) for bold; `lines` are rows with a rule above."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    lines: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def markdown(table: Table) -> str:
    """The table with its title above and its notes below."""
    rows = [
        [f"**{cell}**" if (i, j) in table.best else cell for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    parts = [f"### {table.title}\n"] if table.title else []
    parts.append(tabulate(rows, table.headings, tablefmt="pipe", disable_numparse=True))
    return "\n".join(parts) + "".join(f"\n\n{note}" for note in table.notes)


def latex(table: Table) -> str:
    """A table environment; needs \\usepackage{booktabs}. Text columns left, the others centred."""
    columns = "ll" + "c" * (len(table.headings) - 2)
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(_escaped, table.headings)) + r" \\", r"\midrule"]
    for i, row in enumerate(table.rows):
        if i in table.lines and i:
            lines.append(r"\midrule")
        cells = [
            rf"\textbf{{{_escaped(cell)}}}" if (i, j) in table.best else _escaped(cell) for j, cell in enumerate(row)
        ]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    caption = " ".join(part for part in (table.title + "." if table.title else "", *table.notes) if part)
    if caption:
        lines.append(rf"\caption{{{_escaped(caption)}}}")
    return "\n".join([*lines, r"\end{table}"])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
