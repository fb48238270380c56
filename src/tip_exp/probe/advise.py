"""`tip-exp advise`: which rules at which ratios keep the gradient of all tokens, read off a few batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.diagnostics import share_within
from tip_exp.learner.gradient_signal import GradientSums, cosine
from tip_exp.learner.influence import Direction
from tip_exp.probe.batches import CONFIGURED, Batch, Probe, at_ratios, opened, selectors_of
from tip_exp.probe.influence import percent
from tip_exp.probe.page import advice_page, write_tables
from tip_exp.report.tables import Table
from tip_exp.selector.selector import Selection, Selector

MIN_BATCHES = 4  # of a recommendation: the variance between fewer is hardly known
MIN_SNR, MIN_COSINE = 0.9, 0.9  # of a recommended rule: part of full's signal to noise; cosine with full's gradient
FULL = "full"
CAVEAT = "A gradient close to that of all tokens does not promise an equal result (docs/influence.md)."


def measure(
    probe: Probe, batches: list[Batch], selectors: dict[str, Selector], ratios: list[float]
) -> list[dict[str, Any]]:
    """A row per selector and ratio, full first: shares of tokens, of gradient norm and of KL kept; cosine; SNR.

    One gradient per batch and kept set; equal kept sets are measured once. Holds the full gradient of every batch.
    """
    average = probe.config.learner.average
    whole = [Selection.everything(len(batch.tokens)).averaged(batch.tokens, average) for batch in batches]
    full = [probe.gradient(batch, selection) for batch, selection in zip(batches, whole, strict=True)]
    measured = {_key(whole): _gradient_numbers(full, full)}
    rows: list[dict[str, Any]] = [_row(FULL, 1.0, batches, whole, measured[_key(whole)])]
    for name, selector in at_ratios({n: s for n, s in selectors.items() if n != FULL}, ratios):
        selections = [probe.select(selector, batch).averaged(batch.tokens, average) for batch in batches]
        key = _key(selections)
        if key not in measured:
            gradients = (probe.gradient(batch, part) for batch, part in zip(batches, selections, strict=True))
            measured[key] = _gradient_numbers(gradients, full)
        rows.append(_row(name, selector.retention, batches, selections, measured[key]))
    return rows


def recommendation(rows: list[dict[str, Any]], num_batches: int) -> str:
    """The rule of the fewest tokens whose SNR and cosine are near full's."""
    full = rows[0]
    if num_batches < MIN_BATCHES:
        return (
            f"No recommendation: {num_batches} batches give no reliable signal to noise; read at least {MIN_BATCHES} "
            "(--batches)."
        )
    if not full["snr"] > 0:
        return (
            f"No recommendation: the gradient of all tokens has a signal to noise of {full['snr']:.2g} between these "
            "batches, so these batches do not resolve a signal; read more batches (--batches)."
        )
    enough = [row for row in rows if row["snr"] >= MIN_SNR * full["snr"] and row["cosine"] >= MIN_COSINE]
    best = min(enough, key=lambda row: (row["kept"], -row["snr"]))
    rule = f"SNR at least {MIN_SNR:g} x that of all tokens ({full['snr']:.2f}) and cosine at least {MIN_COSINE:g}"
    if best is full:
        return f"Recommendation: all tokens. No rule at these ratios has {rule}."
    name = best["selector"]
    chosen = "the config's own selector with" if name.endswith(CONFIGURED) else f"selector={name}"
    return (
        f"Recommendation: {chosen} selector.retention={best['retention']:g} keeps "
        f"{percent(best['kept'])} of the tokens with SNR {best['snr']:.2f} and cosine {best['cosine']:.3f}. It is the "
        f"smallest kept share with {rule}, of {len(rows)} measured on {num_batches} batches: other batches can choose "
        f"another.\n\n{CAVEAT}"
    )


def table(rows: list[dict[str, Any]]) -> Table:
    headings = ["selector", "retention", "kept", "gradient mass", "KL mass", "cosine", "SNR"]
    cells = [
        [row["selector"], f"{100 * row['retention']:g} %"]
        + [percent(row[name]) for name in ("kept", "gradient_mass", "kl_mass")]
        + [f"{row[name]:.3f}" for name in ("cosine", "snr")]
        for row in rows
    ]
    note = (
        "Kept: tokens kept of all response tokens. Gradient mass and KL mass: share of the summed norms of the logits' "
        "gradients and of the summed reverse KL on kept tokens. Cosine: of a batch's gradient of kept tokens with that "
        "of all its tokens, mean over batches. SNR: |E g|^2 / Var g of a batch's gradient g, without bias."
    )
    return Table("Selectors before training", headings, cells, notes=[note])


def advise(
    config: RunConfig,
    out: Path,
    *,
    num_batches: int,
    rules: list[str] | None,
    ratios: list[float],
    run: Path | None,
    weights: str,
) -> None:
    """Write advice.csv, advice.md and advice.html into `out`, and print the table and the recommendation."""
    selectors = selectors_of(config, rules)
    with opened(config, run) as probe:
        batches = [probe.read(number) for number in range(num_batches)]
        rows = measure(probe, batches, selectors, ratios)
        num_tokens = sum(len(batch.tokens) for batch in batches)
        head = (
            f"{config.name}: {num_tokens} response tokens of {num_batches} batches after step {probe.trained_steps}"
            f"{f' of {weights}' if weights else ''}. "
            f"{recommendation(rows, num_batches)}"
        )
        pd.DataFrame(rows).to_csv(out / "advice.csv", index=False, float_format="%.6g")
        write_tables(out / "advice.md", "Selectors before training", head, [table(rows)])
        (out / "advice.html").write_text(advice_page(rows, head, [table(rows)]), encoding="utf-8")


def _gradient_numbers(gradients: Any, full: list[Direction]) -> dict[str, float]:
    """Mean cosine with the full gradients, and SNR; one gradient at a time."""
    sums, cosines = GradientSums(), []
    for gradient, of_all in zip(gradients, full, strict=True):
        sums.add(gradient)
        cosines.append(cosine(gradient, of_all))
    return {"cosine": sum(cosines) / len(full), "snr": sums.signal_to_noise()}


def _row(
    name: str, retention: float, batches: list[Batch], selections: list[Selection], numbers: dict[str, float]
) -> dict[str, Any]:
    kept = torch.cat([selection.kept_mask for selection in selections])

    def kept_share(statistic: str) -> float:
        return share_within(torch.cat([batch.statistics[statistic] for batch in batches]).double(), kept)

    shares = {"gradient_mass": kept_share("grad_norm"), "kl_mass": kept_share("reverse_kl")}
    return {"selector": name, "retention": retention, "kept": float(kept.double().mean())} | shares | numbers


def _key(selections: list[Selection]) -> tuple[bytes, ...]:
    """Equal for selections that keep and weight the same tokens."""

    def weights(selection: Selection) -> Tensor:
        ones = torch.ones_like(selection.score) if selection.weights is None else selection.weights
        return torch.where(selection.kept_mask, ones, 0).double()

    return tuple(weights(selection).numpy().tobytes() for selection in selections)
