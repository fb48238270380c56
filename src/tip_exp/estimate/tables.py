"""The tables of `tip-plan memory` and `tip-plan time`, as Markdown; docs/scale.md holds some of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from tabulate import tabulate

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.activations import trained_lengths
from tip_exp.estimate.cards import CARDS, RANKS, Card
from tip_exp.estimate.memory import CARD_SHARE, PHASES, RankMemory
from tip_exp.estimate.time import run_time
from tip_exp.utils.paths import PAPER_PAIRS, paper_numbers_file
from tip_exp.utils.units import GIB

BATCH_STEP = 1024  # tokens; the largest micro-batch is searched in multiples of it
GB = 1e9
NOT_SHOWN = "-"
TIMED_AS_VLLM = (
    "rollouts by transformers are timed as if vLLM sampled them, and rollout.staleness=1 as if nothing overlapped"
)
RANK_COLUMNS = [f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS]


def memory_tables(config: RunConfig, card: Card) -> list[str]:
    """Peak and largest micro-batch by ranks and card, the phases on `card`, the paper's figures where it has some."""
    tables = [_peaks(config, card), _phases(config, card)]
    if config.mode == "train":
        tables.append(_largest_micro_batches(config))
        tables += _beside_the_paper(config)
    return tables


def time_tables(config: RunConfig, card: Card) -> list[str]:
    """Seconds of a step by part on `card`, and hours of the run by ranks and card; first what they do not count."""
    note = [TIMED_AS_VLLM] if RankMemory(config, card.gib).backend == "hf" else []
    return [*note, *([_step(config, card)] if config.mode == "train" else []), _hours(config)]


def format_hours(configs: Sequence[RunConfig], card: Card) -> str:
    """Hours of all `configs` one after another by number of GPUs: "2 x H100: 38 h, 4 x H100: 27 h, 8 x H100: 22 h"."""
    texts: list[str] = []
    for ranks in RANKS:
        if all(RankMemory(config, card.gib, ranks).fits for config in configs):
            hours = sum(run_time(config, card, ranks).run_s for config in configs) / 3600
            texts.append(f"{ranks} x {card.name}: {hours:,.{0 if hours >= 9.95 else 1}f} h")
    return ", ".join(texts) or f"more than {RANKS[-1]} x {card.name}"


def largest_micro_batch_tokens(config: RunConfig, card: Card, ranks: int) -> int | None:
    """The most learner.micro_batch_tokens that fit, in multiples of BATCH_STEP; None if one rollout does not fit.

    At most what holds a rank's whole share of a step.
    """
    longest = trained_lengths(config)[0]
    low, high = -(-longest // BATCH_STEP), -(-longest * RankMemory(config, card.gib, ranks).rollouts // BATCH_STEP)
    if not _fits(config, card, ranks, low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(config, card, ranks, middle) else (low, middle - 1)
    return low * BATCH_STEP


def _fits(config: RunConfig, card: Card, ranks: int, steps: int) -> bool:
    return RankMemory(with_learner(config, micro_batch_tokens=steps * BATCH_STEP), card.gib, ranks).fits


def with_learner(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"learner": config.learner.model_copy(update=changes)})


def _card_columns() -> list[str]:
    return [f"{gb} GB ({card.name})" for gb, card in CARDS.items()]


def _peaks(config: RunConfig, host_of: Card) -> str:
    rows = []
    for ranks in RANKS:
        cells = []
        for card in CARDS.values():
            memory = RankMemory(config, card.gib, ranks)
            phase, gib = memory.peak()
            given, needed = memory.engine_gib()
            reason = ""
            if not memory.fits:
                reason = " too large" if gib > CARD_SHARE * card.gib else f" engine needs {needed:.1f} of {given:.1f}"
            cells.append(f"{gib:.1f} {phase}{reason}")
        rows.append([ranks, *cells, f"{RankMemory(config, host_of.gib, ranks).host_peak_gib:.0f}"])
    return _table("GiB of a rank at its peak, and the phase", ["ranks", *_card_columns(), "host GiB a rank"], rows)


def _phases(config: RunConfig, card: Card) -> str:
    memories = [RankMemory(config, card.gib, ranks) for ranks in RANKS]
    by_ranks = [memory.phases() for memory in memories]
    rows = []
    for name in PHASES:
        if name in by_ranks[0]:
            rows.append(
                [name, *(f"{phases[name].device_gib:.1f} + {phases[name].host_gib:.1f}" for phases in by_ranks)]
            )
    title = f"Device + host GiB of a rank by phase, {_card_columns()[list(CARDS.values()).index(card)]}"
    return _table(title, ["phase", *RANK_COLUMNS], rows)


def _largest_micro_batches(config: RunConfig) -> str:
    rows = []
    for ranks in RANKS:
        sizes = [largest_micro_batch_tokens(config, card, ranks) for card in CARDS.values()]
        rows.append([ranks, *(NOT_SHOWN if size is None else f"{size:,}" for size in sizes)])
    return _table("Largest learner.micro_batch_tokens that fits", ["ranks", *_card_columns()], rows)


def _beside_the_paper(config: RunConfig) -> list[str]:
    """Peak GB of one of 8 ranks outside rollouts, by retention and loss backend, and the paper's peak."""
    printed: dict[float, str] = {}
    with paper_numbers_file().open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            same_pair = PAPER_PAIRS[row["pair"]] == config.pair.label
            if row["benchmark"] == "peak_memory" and same_pair and row["method"] in ("full", "entropy_sample"):
                printed[float(row["retention"])] = row["mean"]
    rows = []
    for retention, paper in sorted(printed.items(), reverse=True):
        cells = []
        for backend in ("materialized", "fused"):
            selector = config.selector.model_copy(update={"retention": retention})
            changed = with_learner(config, loss_backend=backend).model_copy(update={"selector": selector})
            phases = RankMemory(changed, CARDS[141].gib, 8).phases()
            cells.append(f"{max(phases[name].device_gib for name in ('teacher', 'score', 'backward')) * GIB / GB:.1f}")
        rows.append([f"{100 * retention:g} %", *cells, paper])
    title = (
        "Peak GB of the learner, 8 ranks of 141 GB (H200), beside the paper's (Table 3; it does not say what it counts)"
    )
    return [_table(title, ["retention", "materialized", "fused", "paper"], rows)] if rows else []


def _step(config: RunConfig, card: Card) -> str:
    times = [run_time(config, card, ranks) for ranks in RANKS]
    rows = [[part, *(f"{time.step[part]:.1f}" for time in times)] for part in times[0].step]
    rows.append(["step", *(f"{time.step_s:.1f}" for time in times)])
    rows.append(["fits", *("yes" if RankMemory(config, card.gib, ranks).fits else "no" for ranks in RANKS)])
    return _table(f"Seconds of a step on {card.name}", ["part", *RANK_COLUMNS], rows)


def _hours(config: RunConfig) -> str:
    rows = [[ranks, *(_run_hours(config, card, ranks) for card in CARDS.values())] for ranks in RANKS]
    title = (
        "Hours of the run with its evaluations, and GPU-hours, where it fits (without a teacher's evaluation whose "
        "engine does not fit: eval.teacher=false)"
    )
    return _table(title, ["ranks", *_card_columns()], rows)


def _run_hours(config: RunConfig, card: Card, ranks: int) -> str:
    if not RankMemory(config, card.gib, ranks).fits:
        return NOT_SHOWN
    hours = run_time(config, card, ranks).run_s / 3600
    return f"{hours:.1f} ({ranks * hours:,.0f})"


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"{title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"
