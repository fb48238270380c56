"""Plots beside the CSVs of `tip-bench`; drawn if matplotlib is there, which the [bench] extra brings."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks import measuring


def loss(table: Path) -> Path | None:
    """CPU seconds and memory against retention, at the size with most runs; memory against tokens. None: not drawn."""
    if measuring.missing(["matplotlib"]):
        measuring.tell_missing(["matplotlib"], "no plot is drawn")
        return None
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    rows = pd.read_csv(table)
    sizes = rows.groupby(["vocab", "tokens"]).size()
    vocab, tokens = list(sizes.index)[int(sizes.to_numpy().argmax())]
    here = rows[(rows.vocab == vocab) & (rows.tokens == tokens)]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        (here, "retention", "cpu_s", f"CPU seconds, {tokens} tokens, vocabulary {vocab:,}"),
        (here, "retention", "peak_extra_mib", f"peak extra MiB, {tokens} tokens, vocabulary {vocab:,}"),
        (rows[(rows.vocab == vocab) & (rows.retention == 1)], "tokens", "peak_extra_mib", "peak extra MiB, all kept"),
    )
    colours = {name: colormaps["tab20"](i) for i, name in enumerate(sorted(set(rows.implementation)))}
    for axis, (part, x, y, title) in zip(axes, panels, strict=True):
        for name, group in part.groupby("implementation"):
            if name == "floor" and y == "peak_extra_mib":
                continue  # products alone hold nothing that counts
            middle = group.groupby(x)[y].median()
            axis.plot(middle.index, middle.to_numpy(), marker="o", label=name, color=colours[str(name)])
        axis.set(xlabel=x, title=title)
        if y == "peak_extra_mib":
            axis.set_yscale("log")
        if x == "tokens":
            axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    out = table.with_suffix(".svg")
    figure.savefig(out)
    return out
