"""`tip-exp influence`: the influence of every token of a few batches, and how much of it each rule would keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.diagnostics import share_within
from tip_exp.learner.influence import mean_of, parameters_of, preconditioned, second_moments
from tip_exp.probe.batches import Batch, Probe, at_ratios, opened, selectors_of
from tip_exp.probe.page import influence_page, write_tables
from tip_exp.report.tables import Table
from tip_exp.selector.selector import Quadrants, Selection, Selector, budgets, keep_top

TOP_SHARES = (0.01, 0.05, 0.1)  # of the tokens; the table has the influence that each holds
ORACLE = "influence itself"
NUM_TOP = 25  # tokens in the list of the largest influences


@dataclass(frozen=True, slots=True)
class Measured:
    """Batches with the influence of their tokens; `values[i]` (N,) belongs to `batches[i]`."""

    batches: list[Batch]
    values: list[Tensor]
    thresholds: Quadrants

    @property
    def influence(self) -> Tensor:
        return torch.cat(self.values)

    def statistic(self, name: str) -> Tensor:
        """A statistic of all tokens, (N,), float64."""
        return torch.cat([batch.statistics[name] for batch in self.batches]).double()

    def quadrants(self) -> dict[str, Tensor]:
        statistics = {name: self.statistic(name) for name in ("entropy", "reverse_kl")}
        return self.thresholds.masks(statistics)


def measure(probe: Probe, num_batches: int, *, fresh: bool, adam: bool) -> Measured:
    """Influence of the tokens of `num_batches` batches on the mean divergence of as many fresh ones, or on their own.

    `adam`: P = 1 / (sqrt(v) + learner.eps), v the optimizer's, or before any step the mean square of the batches'
    gradients; else P = 1.
    """
    batches = [probe.read(number) for number in range(num_batches)]
    directing = [probe.read(number) for number in range(num_batches, 2 * num_batches)] if fresh else batches
    average = probe.config.learner.average
    everything = [Selection.everything(len(batch.tokens)).averaged(batch.tokens, average) for batch in directing]
    gradients = [probe.gradient(batch, whole) for batch, whole in zip(directing, everything, strict=True)]
    parameters = parameters_of(probe.parts.pair.student)
    moments = second_moments(probe.parts.learner.optimizer, parameters, gradients) if adam else None
    mean = mean_of(gradients) if fresh else {}
    values: list[Tensor] = []
    for number, batch in enumerate(batches):
        direction = mean if fresh else gradients[number]
        if moments is not None:
            direction = preconditioned(direction, moments, probe.config.learner.eps)
        values.append(probe.influence(batch, direction))
    return Measured(batches, values, Quadrants(**probe.config.quadrants.model_dump()))


def quadrant_table(measured: Measured) -> Table:
    """Share of tokens, of divergence and of influence in each quadrant."""
    influence, kl, norm = measured.influence, measured.statistic("reverse_kl"), measured.statistic("grad_norm")
    headings = ["quadrant", "tokens", "reverse KL", "gradient mass", "positive", "negative", "density", "I > 0"]
    rows: list[list[str]] = []
    for name, inside in measured.quadrants().items():
        density = float(influence[inside].mean() / influence.mean()) if bool(inside.any()) else float("nan")
        values = [float(inside.double().mean()), *(share_within(v, inside) for v in (kl, norm, influence.clamp(min=0)))]
        values += [float((-influence[inside]).clamp(min=0).sum() / influence.clamp(min=0).sum())]
        above = float((influence[inside] > 0).double().mean()) if bool(inside.any()) else float("nan")
        rows.append([name.upper(), *map(percent, values), f"{density:.3g}", percent(above)])
    note = (
        "Shares of all tokens, of the summed reverse KL, of the summed norms of the logits' gradients and of the "
        "summed positive influence I. Negative: sum of the quadrant's I < 0 over the same sum of positive I. Density: "
        "mean I over that of all tokens."
    )
    return Table("Quadrants", headings, rows, notes=[note])


def concentration_table(measured: Measured) -> Table:
    """Share of the positive influence that the tokens of the highest influence hold."""
    positive = measured.influence.clamp(min=0).sort(descending=True).values
    shares = [float(positive[: max(1, int(top * len(positive)))].sum() / positive.sum()) for top in TOP_SHARES]
    rows = [[percent(top), percent(held)] for top, held in zip(TOP_SHARES, shares, strict=True)]
    return Table("Concentration", ["top tokens by influence", "of the positive influence"], rows)


def captured(
    measured: Measured, probe: Probe, selectors: dict[str, Selector], ratios: list[float]
) -> list[dict[str, Any]]:
    """Share of the tokens, of the positive influence and of the signed sum that each rule keeps; first the oracle's."""
    points: list[dict[str, Any]] = []
    for retention in ratios:
        masks = []
        for values in measured.values:
            groups = torch.zeros(len(values), dtype=torch.long)
            masks.append(keep_top(values, groups, budgets(groups, retention, "at_least_one")))
        points.append(_point(ORACLE, retention, measured, masks) | {"budget": True})
    for name, selector in at_ratios(selectors, ratios):
        masks = [probe.select(selector, batch).kept_mask for batch in measured.batches]
        point = _point(name, selector.retention, measured, masks)
        points.append(point | {"budget": selector.order != "positive"})
    return points


def _point(name: str, retention: float, measured: Measured, masks: list[Tensor]) -> dict[str, Any]:
    kept, influence = torch.cat(masks), measured.influence
    return {
        "selector": name,
        "retention": retention,
        "kept": float(kept.double().mean()),
        "positive": share_within(influence.clamp(min=0), kept),
        "signed": float(influence[kept].sum() / influence.sum()),
    }


def captured_table(points: list[dict[str, Any]], ratios: list[float]) -> Table:
    """% of the positive influence by rule and ratio; a rule without a budget has its share in the last column."""
    names = list(dict.fromkeys(point["selector"] for point in points))
    by_key = {(point["selector"], point["retention"]): point for point in points}
    rows: list[list[str]] = []
    for name in names:
        of_rule = [point for point in points if point["selector"] == name]
        unbudgeted = not of_rule[0]["budget"]
        cells = ["" if unbudgeted else percent(by_key[name, ratio]["positive"]) for ratio in ratios]
        alone = f"{percent(of_rule[0]['positive'])} of influence in {percent(of_rule[0]['kept'])} of tokens"
        rows.append([name, *cells, alone if unbudgeted else ""])
    headings = ["selector", *(f"{100 * ratio:g} %" for ratio in ratios), "without a budget"]
    note = f"{ORACLE}: the highest influences of each batch. Rules round their budgets as their presets do."
    return Table("Captured positive influence by retention", headings, rows, notes=[note])


def correlation_table(measured: Measured) -> Table:
    """Spearman's rank correlation of each statistic with influence and with its size."""
    influence = measured.influence
    statistics = {name: measured.statistic(name) for name in measured.batches[0].statistics}
    statistics["position"] = torch.cat([batch.tokens.position for batch in measured.batches]).double()
    rows = [(name, spearman(v, influence), spearman(v, influence.abs())) for name, v in statistics.items()]
    rows.sort(key=lambda row: -abs(row[2]))
    cells = [[name, f"{with_sign:.2f}", f"{size:.2f}"] for name, with_sign, size in rows]
    return Table("Rank correlation", ["statistic", "with I", "with |I|"], cells)


def token_frame(measured: Measured, probe: Probe) -> Any:
    """A row per token: batch (step), sequence, position, token, statistics, quadrant, influence."""
    parts: list[Any] = []
    for batch, values in zip(measured.batches, measured.values, strict=True):
        ids = torch.cat([micro_batch.token_ids.cpu() for micro_batch in batch.micro_batches])
        columns = {"batch": batch.step, "sequence": batch.tokens.rollout, "position": batch.tokens.position}
        columns |= {"token_id": ids, **batch.statistics, "influence": values}
        parts.append(pd.DataFrame({name: getattr(v, "numpy", lambda v=v: v)() for name, v in columns.items()}))
    frame: Any = pd.concat(parts, ignore_index=True)
    texts = {token: probe.parts.pair.decode([token], with_special=True) for token in frame["token_id"].unique()}
    frame.insert(4, "token", frame["token_id"].map(texts))
    quadrant = frame["token"].copy()
    for name, inside in measured.quadrants().items():
        quadrant[inside.numpy()] = name.upper()
    frame.insert(len(frame.columns) - 1, "quadrant", quadrant)
    return frame.sort_values(["batch", "sequence", "position"], ignore_index=True)


def top_table(frame: Any) -> Table:
    """The tokens of the largest influence by size, with the text before them."""
    frame = frame.assign(size=frame["influence"].abs())
    columns = ["influence", "quadrant", "entropy", "reverse_kl", "grad_norm"]
    rows: list[list[str]] = []
    for row in frame.nlargest(NUM_TOP, "size").itertuples():
        before = frame[(frame["batch"] == row.batch) & (frame["sequence"] == row.sequence)]
        text = "".join(before[before["position"] < row.position]["token"])[-40:]
        cells = [getattr(row, name) for name in columns]
        numbers = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells]
        rows.append([f"{text!r}", f"{row.token!r}", *numbers])
    return Table("Tokens of the largest influence", ["text before", "token", *columns], rows)


def spearman(a: Tensor, b: Tensor) -> float:
    ranked: Any = spearmanr(a.cpu(), b.cpu())
    return float(ranked.statistic)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.{1 if abs(fraction) >= 0.01 else 2}f} %"


def influence(
    config: RunConfig,
    out: Path,
    *,
    num_batches: int,
    fresh: bool,
    adam: bool,
    rules: list[str] | None,
    ratios: list[float],
    run: Path | None,
    weights: str,
) -> None:
    """Write tokens.parquet, captured.csv, influence.md and influence.html into `out`, and print the tables."""
    selectors = selectors_of(config, rules)
    with opened(config, run) as probe:
        measured = measure(probe, num_batches, fresh=fresh, adam=adam)
        points = captured(measured, probe, selectors, ratios)
        frame = token_frame(measured, probe)
        tables = [quadrant_table(measured), concentration_table(measured), captured_table(points, ratios)]
        tables += [correlation_table(measured), top_table(frame)]
        direction = f"{num_batches} fresh batches" if fresh else "each batch itself"
        head = (
            f"{config.name}: {len(frame)} response tokens of {num_batches} batches after step {probe.trained_steps}"
            f"{f' of {weights}' if weights else ''}. "
            f"Direction: mean {config.learner.divergence} of {direction}; "
            f"P = {f'Adam, eps {config.learner.eps:g}' if adam else 'identity'}."
        )
        frame.to_parquet(out / "tokens.parquet")
        pd.DataFrame(points).to_csv(out / "captured.csv", index=False, float_format="%.6g")
        write_tables(out / "influence.md", "Token influence", head, tables)
        (out / "influence.html").write_text(influence_page(measured, probe, points, head, tables), encoding="utf-8")
