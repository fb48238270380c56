"""A table of text cells, and its Markdown and LaTeX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from tip_exp.utils.io import write_atomic

_LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {
        "±": r"$\pm$",
        "−": "$-$",
        "ρ": r"$\rho$",
        "Δ": r"$\Delta$",
        "×": r"$\times$",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `best`: cells (row, column) in bold; `lines`: rows with a rule above, which only LaTeX shows."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    lines: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def markdown(table: Table) -> str:
    """The title, the table, the notes."""
    title = f"### {table.title}\n\n" if table.title else ""
    rows = _with_bold(table.rows, table.best, "**", "**")
    rows = [[_markdown_cell(cell) for cell in row] for row in rows]
    headings = list(map(_markdown_cell, table.headings))
    text = tabulate(rows, headings, tablefmt="pipe", disable_numparse=True)
    return title + text + "".join(f"\n\n{note}" for note in table.notes)


def _markdown_cell(text: str) -> str:
    """One line without a bar that would end the cell."""
    return " ".join(text.replace("|", "\\|").splitlines())


def latex(table: Table) -> str:
    """A table environment; needs \\usepackage{booktabs}. The first two columns are left-aligned, the others centered.

    Not by tabulate: its latex_booktabs escapes the markup of bold cells.
    """
    rows = _with_bold([[cell.translate(_LATEX) for cell in row] for row in table.rows], table.best, r"\textbf{", "}")
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{ll{'c' * (len(table.headings) - 2)}}}", r"\toprule"]
    lines += [" & ".join(heading.translate(_LATEX) for heading in table.headings) + r" \\", r"\midrule"]
    for i, row in enumerate(rows):
        lines += [r"\midrule"] if i in table.lines else []
        lines.append(" & ".join(row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    caption = " ".join([*([f"{table.title}."] if table.title else []), *table.notes]).translate(_LATEX)
    return "\n".join([*lines, *([rf"\caption{{{caption}}}"] if caption else []), r"\end{table}"])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def _with_bold(rows: list[list[str]], best: frozenset[tuple[int, int]], before: str, after: str) -> list[list[str]]:
    return [
        [before + cell + after if (i, j) in best else cell for j, cell in enumerate(row)] for i, row in enumerate(rows)
    ]
