"""How well the kept tokens stand for all tokens: cosine and signal to noise of their gradient, share of influence."""

from __future__ import annotations

import math

import torch

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.backward import Backward
from tip_exp.learner.data_parallel import StepTokens, share_batches
from tip_exp.learner.diagnostics import share_within
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.influence import (
    Direction,
    dot,
    gradient,
    influence,
    parameters_of,
    preconditioned,
    second_moments,
)
from tip_exp.learner.objective import ObjectiveOf
from tip_exp.learner.teacher import TeacherHidden, to_pair
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.pair import Pair
from tip_exp.records import metrics as names
from tip_exp.selector.selector import Selection
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
                self.total[name] = scale * (tensor.float() if tensor.dtype.itemsize < 4 else tensor)
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


def gradient_metrics(
    pair: Pair,
    config: LearnerConfig,
    rollouts: list[Rollout],
    batches: list[MicroBatch],
    teacher_hidden: TeacherHidden,
    share: StepTokens,
    selection: Selection,
    objective_of: ObjectiveOf,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """Cosine of the step's gradient over `selection` with that over all response tokens, and SNR of both.

    `batches`, `teacher_hidden`, `share`: this rank's part of the step. `selection` is weighted as the update's. An
    observation is the gradient of one prompt's rollouts, scaled so that the mean of the P observations is the step's
    gradient; the SNR of the step is P times that of an observation. `.grad` stays as it is. Costs two forward and
    backward passes of the rollouts; memory: four gradients and the teacher's hidden states.

    If weights are not sharded, also the share of the positive influence on the mean divergence of all the step's tokens
    that the kept tokens hold (`influence`, with Adam's P): about two forward passes more.
    """
    tokens, ranks, per_prompt = share.tokens, Ranks(), config.samples_per_prompt
    prompts = [range(start, start + per_prompt) for start in range(0, len(rollouts), per_prompt)]
    counts = torch.bincount(tokens.rollout, minlength=len(rollouts)).tolist()
    rows_of = tokens.rollout.argsort(stable=True).split(counts)
    teacher_rows = torch.cat(list(teacher_hidden))
    local_row = torch.zeros(len(tokens), dtype=torch.long)
    local_row[share.rows] = torch.arange(len(teacher_rows))
    parts = {"kept": selection, "full": Selection.everything(len(tokens)).averaged(tokens, config.average)}
    sums = {name: GradientSums() for name in parts}
    for indices in prompts:
        part_batches = share_batches(
            rollouts, ranks, config.micro_batch_tokens, pair.pad_id, packing=config.packing, among=indices
        )
        members = torch.cat([batch.rollout.unique_consecutive() for batch in part_batches]).tolist()
        rows = torch.cat([rows_of[0][:0], *(rows_of[index] for index in members)])
        part_hidden = teacher_rows[local_row[rows].to(teacher_rows.device)]
        hidden = part_hidden.split([batch.num_tokens for batch in part_batches])
        of_prompt = torch.cat([rows_of[index] for index in indices])
        for name, whole in parts.items():
            mass = whole.at(of_prompt).mass
            observed = gradient(
                Backward.of(config),
                pair.student,
                pair.teacher.head,
                to_pair(part_batches, pair),
                hidden,
                whole.at(rows),
                objective_of,
                mass=mass,
            )
            sums[name].add(observed, len(prompts) * mass / whole.mass)
    kept, full = sums.values()
    metrics = {names.GRADIENT_COSINE: cosine(kept.total, full.total)}
    for name, of_part in ((names.GRADIENT_SNR, kept), (names.GRADIENT_SNR_FULL, full)):
        metrics[name] = len(prompts) * of_part.signal_to_noise()
    attention = str(pair.student.module.config._attn_implementation)
    if pair.student.shards is None and "flash" not in attention:  # others have no forward mode
        step_gradient = {name: total.div_(len(prompts)) for name, total in full.total.items()}
        moments = second_moments(optimizer, parameters_of(pair.student), [step_gradient])
        direction = preconditioned(step_gradient, moments, config.eps)
        values = influence(
            pair.student, pair.teacher.head, batches, teacher_hidden, direction, objective_of, config.tile_mib * MIB
        )
        metrics[names.INFLUENCE_SHARE] = share_within(values.cpu().clamp(min=0), selection.at(share.rows).kept_mask)
    return metrics
