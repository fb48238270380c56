"""What each selector of a report keeps of the same tokens, so that the kept sets can be compared token by token.

The samples of a run show what its selector kept of its own student's rollouts, and rollouts differ between runs. Here
the recorded statistics of one set of rollouts go through every selector. Normalization is over these rollouts, which
are fewer than those of a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Quadrants, Selector, Tokens, jaccard


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Tokens with their statistics, which of them each arm keeps, and the Jaccard index of each pair of arms."""

    statistics: dict[str, list[float]]
    tokens: list[str]
    positions: list[tuple[int, int]]  # of each token: the number of its rollout, and its position in the response
    kept: dict[str, list[bool]]
    matrix: list[list[float]]


def overlaps(rows: list[dict[str, Any]], arms: dict[str, dict[str, Any]]) -> Overlaps:
    """`rows` (any number) of samples.jsonl; `arms`: name -> config of a run.

    Arms are left out whose rule is not what it was in the run, is gone, reads a statistic that a row lacks, or fails on
    these rows.
    """
    if not rows:
        return Overlaps({}, [], [], {}, [])
    names = [name for name in STATISTICS if all(name in row for row in rows)]
    statistics = {name: torch.tensor([value for row in rows for value in row[name]]) for name in names}
    lengths = [len(row["tokens"]) for row in rows]
    tokens = Tokens(
        rollout=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        micro_batch=torch.zeros(sum(lengths), dtype=torch.long),
        position=torch.cat([torch.arange(length) for length in lengths]),
    )
    kept: dict[str, torch.Tensor] = {}
    for name, config in arms.items():
        options = {key: value for key, value in config["selector"].items() if key not in ("label", "shadows")}
        try:
            selector = Selector(**options, quadrants=Quadrants(**config["quadrants"]))
            if selector.required_stats <= statistics.keys():
                kept[name] = selector(statistics, tokens, torch.Generator().manual_seed(0)).kept_mask
        except (ValueError, TypeError, ArithmeticError):  # the rule or a key is gone, or scores these few tokens NaN
            continue
    return Overlaps(
        statistics={name: values.tolist() for name, values in statistics.items()},
        tokens=[token for row in rows for token in row["tokens"]],
        positions=[(i, position) for i, length in enumerate(lengths) for position in range(length)],
        kept={name: mask.tolist() for name, mask in kept.items()},
        matrix=[[jaccard(mask, column_mask) for column_mask in kept.values()] for mask in kept.values()],
    )
