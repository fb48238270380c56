"""How well the gradient of the kept tokens stands for that of all tokens: cosine, and signal to noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.influence import Direction, dot, gradient
from tip_exp.learner.objective import ObjectiveOf
from tip_exp.learner.teacher import to_pair
from tip_exp.models.micro_batch import collate, group
from tip_exp.models.pair import Pair
from tip_exp.records import metrics as names
from tip_exp.selector.selector import Selection, Tokens
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB


class GradientSums:
    """Sums over independent observations g of a gradient."""

    def __init__(self) -> None:
        self.total: Direction = {}
        self.squares, self.count = 0.0, 0

    def add(self, observed: Direction, scale: float = 1.0) -> None:
        """Add scale x observed; a parameter that it leaves out is 0."""
        for name, tensor in observed.items():
            if name in self.total:
                self.total[name].add_(tensor, alpha=scale)
            else:
                self.total[name] = tensor * scale
        self.squares += scale**2 * dot(observed, observed)
        self.count += 1

    def signal_to_noise(self) -> float:
        """|E g|^2 / Var g without bias; NaN for fewer than two observations or without variance.

        Var g = sum |g - mean|^2 / (B - 1), and |mean|^2 exceeds |E g|^2 by Var g / B on average. Can be negative.
        """
        if self.count < 2:
            return math.nan
        mean_square = dot(self.total, self.total) / self.count**2
        variance = (self.squares - self.count * mean_square) / (self.count - 1)
        return (mean_square - variance / self.count) / variance if variance > 0 else math.nan


def cosine(a: Direction, b: Direction) -> float:
    """0 if one of them is 0."""
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms else 0.0


def everything(tokens: Tokens, average: str) -> Selection:
    """All tokens, weighted as `learner.average` says."""
    ones = torch.ones(len(tokens))
    selection = Selection(ones.bool(), ones)
    return selection.mean_by_rollout(tokens) if average == "rollout" else selection


def gradient_metrics(
    pair: Pair,
    config: LearnerConfig,
    rollouts: list[Rollout],
    teacher_rows: Tensor,
    tokens: Tokens,
    selection: Selection,
    objective_of: ObjectiveOf,
) -> dict[str, float]:
    """Of a step's gradient: cosine of that of `selection` with that of all response tokens, and SNR of both.

    teacher_rows (N, D): the teacher's hidden states at `tokens`. `selection` is weighted as the update's. An
    observation is the part of one prompt's rollouts, scaled so that the mean over the P prompts is the step's gradient;
    this has P times an observation's SNR. `.grad` stays as it is. Costs two forward and backward passes of the
    rollouts; memory: three gradients and the teacher's hidden states.
    """
    lengths, per_prompt = [len(rollout.token_ids) for rollout in rollouts], config.samples_per_prompt
    prompts = [range(start, start + per_prompt) for start in range(0, len(rollouts), per_prompt)]
    rows_of = tokens.rollout.argsort(stable=True).split(
        torch.bincount(tokens.rollout, minlength=len(rollouts)).tolist()
    )
    parts = {"kept": selection, "full": everything(tokens, config.average)}
    sums = {name: GradientSums() for name in parts}
    for indices in prompts:
        groups = group(lengths, config.micro_batch_tokens, packing=config.packing, indices=indices)
        batches = to_pair((collate(rollouts, members, pair.pad_id, packing=config.packing) for members in groups), pair)
        rows = torch.cat([rows_of[index] for members in groups for index in members])
        hidden = teacher_rows[rows.to(teacher_rows.device)].split([batch.num_tokens for batch in batches])
        for name, whole in parts.items():
            part = whole.at(rows)
            observed = gradient(
                pair.student,
                pair.teacher.head,
                batches,
                hidden,
                part,
                objective_of,
                config.tile_mib * MIB,
                checkpointed=config.activation_checkpointing,
            )
            sums[name].add(observed, len(prompts) * part.mass / (whole.mass or 1.0))
    kept, full = sums.values()
    metrics = {names.GRADIENT_COSINE: cosine(kept.total, full.total)}
    for name, of_part in ((names.GRADIENT_SNR, kept), (names.GRADIENT_SNR_FULL, full)):
        metrics[name] = len(prompts) * of_part.signal_to_noise()
    return metrics
