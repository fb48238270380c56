"""The figure beside loss.csv; needs matplotlib, which the [bench] extra installs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks import measuring


def plot_loss(csv_file: Path) -> Path | None:
    """Draw time and memory against retention, and memory against tokens, for the size with most rows.

    Returns the SVG file; None if matplotlib is not installed.
    """
    if measuring.missing(["matplotlib"]):
        measuring.warn_missing(["matplotlib"], "no plot is drawn")
        return None
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    rows = pd.read_csv(csv_file)
    sizes = rows.groupby(["vocab", "tokens"]).size()
    vocab, tokens = list(sizes.index)[int(sizes.to_numpy().argmax())]
    same_size = rows[(rows.vocab == vocab) & (rows.tokens == tokens)]
    all_kept = rows[(rows.vocab == vocab) & (rows.retention == 1)]
    size = f"{tokens} tokens, vocabulary {vocab:,}"
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        (same_size, "retention", "cpu_s", f"CPU seconds, {size}"),
        (same_size, "retention", "peak_extra_mib", f"peak extra MiB, {size}"),
        (all_kept, "tokens", "peak_extra_mib", "peak extra MiB, all tokens kept"),
    )
    colours = {name: colormaps["tab20"](i) for i, name in enumerate(sorted(set(rows.implementation)))}
    for axis, (panel, x, y, title) in zip(axes, panels, strict=True):
        for name, group in panel.groupby("implementation"):
            if name == "floor" and y == "peak_extra_mib":
                continue  # the GEMMs alone hold next to nothing
            median = group.groupby(x)[y].median()
            axis.plot(median.index, median.to_numpy(), marker="o", label=name, color=colours[str(name)])
        axis.set(xlabel=x, title=title)
        if y == "peak_extra_mib":
            axis.set_yscale("log")
        if x == "tokens":
            axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    svg_file = csv_file.with_suffix(".svg")
    figure.savefig(svg_file)
    return svg_file
