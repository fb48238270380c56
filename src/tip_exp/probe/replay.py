"""`tip-exp replay`: repeat a step with NaN or infinity, and show in which rollouts and modules it first appears.

Weights and optimizer are those of the run's newest checkpoint before the step; steps between the two are repeated, with
their draws. One process does it, whatever the number of ranks of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tip_exp.build import TrainingParts
from tip_exp.config.parse import load
from tip_exp.learner.adamw import divide_gradients, local_part
from tip_exp.learner.checkpoint import Checkpoints
from tip_exp.learner.distributed import ALONE
from tip_exp.learner.objective import make_objective
from tip_exp.learner.teacher import split
from tip_exp.probe.batches import scratch_parts
from tip_exp.records import metrics as names
from tip_exp.records.folder import RunFolder, read_budgets
from tip_exp.report.tables import Table, markdown
from tip_exp.selector.selector import Selection
from tip_exp.types import Problem, Rollout

MAX_ROWS = 20  # of the table


@dataclass(frozen=True, slots=True)
class Measured:
    """One rollout of the step: means over all its response tokens, whatever the selector keeps of them."""

    number: int
    problem: str
    tokens: int
    loss: float  # nats a token
    grad_norm: float
    where: str  # the first module whose output is not finite, else the part of the step; "" if all is finite


def replayed(folder: RunFolder, batch: dict[str, Any]) -> str:
    """The fault that the run reported, that of the repeated step, and a row for each rollout, the faulty ones first.

    `batch`: as `read_batch` of probe/command.py returns it.
    """
    step, rollouts = int(batch["step"]), [_rollout(row) for row in batch["rollouts"]]
    with scratch_parts(load(folder.config)) as parts:
        weights = _go_to(parts, folder, step)
        problems = parts.train.batch(step)[1]
        models = {"teacher": parts.pair.teacher.module, "student": parts.pair.student.module}
        bad = [f"{role}: {name}" for role, model in models.items() for name in _not_finite_weights(model)]
        measured = [_measure(parts, *row) for row in zip(range(len(rollouts)), rollouts, problems, strict=True)]
        again = _whole_step(parts, step, rollouts, problems)
    lines = [f"{folder.root}, step {step}: {batch['fault']}", f"weights: {weights}", f"the step again: {again}"]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        lines.append(f"weights that are not finite: {', '.join(bad[:3])}{more}")
    return "\n".join(lines) + "\n\n" + _table(measured)


def _table(measured: list[Measured]) -> str:
    def fault_first(row: Measured) -> tuple[bool, float, int]:
        return not row.where, -row.grad_norm if math.isfinite(row.grad_norm) else -math.inf, row.number

    ordered = sorted(measured, key=fault_first)
    rows = [
        [str(row.number), row.problem, str(row.tokens), f"{row.loss:.4g}", f"{row.grad_norm:.4g}", row.where]
        for row in ordered[:MAX_ROWS]
    ]
    headings = ["rollout", "problem", "tokens", "loss, nats", "gradient norm", "first not finite"]
    faulty = sum(bool(row.where) for row in measured)
    notes = [f"{faulty} of {len(measured)} rollouts not finite; means over all response tokens of a rollout."]
    if len(measured) > MAX_ROWS:
        notes[0] += f" {len(measured) - MAX_ROWS} rows are left out."
    return markdown(Table("", headings, rows, notes=notes))


def _rollout(row: dict[str, Any]) -> Rollout:
    """JSON has null for log-probabilities that are not finite."""
    logprobs = [math.nan if value is None else value for value in row["sampler_logprobs"]]
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(Rollout)}
    values["sampler_logprobs"] = logprobs
    return Rollout(**values)


def _go_to(parts: TrainingParts, folder: RunFolder, step: int) -> str:
    """Bring pair and optimizer to the start of `step`; returns how."""
    saved = Checkpoints(folder.checkpoints, ALONE).newest(before=step)
    parts.train_step.budgets = read_budgets(folder.micro_batches)
    if saved is not None and saved.step + 1 < step:
        parts.inputs.check_saved(saved)  # the steps between are sampled again
    start = parts.resume(saved)
    for earlier in range(start + 1, step):
        parts.train_step(earlier, *parts.rollouts(earlier))
        parts.sync()
    source = "the pair's own" if saved is None else f"{saved.path.parent.name}/{saved.path.name}"
    return source + (f", then {step - 1 - start} more of the run's steps" if start + 1 < step else "")


def _measure(parts: TrainingParts, number: int, rollout: Rollout, problem: Problem) -> Measured:
    pair, config, learner = parts.pair, parts.config.learner, parts.learner
    unclipped = {"reverse_kl": torch.zeros(0)}  # by a quantile of the step, which one rollout does not have
    with _first_not_finite({"teacher": pair.teacher.module, "student": pair.student.module}) as first:
        teacher_hidden = parts.teacher.hidden([rollout], [problem])
        (batch,) = split([rollout], pair, config, ALONE)
        with pair.student.whole(trains=True), pair.teacher.whole():
            everything = Selection.everything(batch.num_tokens)
            objective_of = make_objective(config, unclipped)
            total = learner.backward(pair.student, pair.teacher.head, [batch], teacher_hidden, everything, objective_of)
    norm = float(divide_gradients(learner.parameters, batch.num_tokens))
    learner.optimizer.zero_grad(set_to_none=True)
    loss = float(total) / batch.num_tokens
    unnamed = "loss" if not math.isfinite(loss) else "" if math.isfinite(norm) else "backward pass"
    return Measured(number, problem.id, batch.num_tokens, loss, norm, first[0] if first else unnamed)


def _whole_step(parts: TrainingParts, step: int, rollouts: list[Rollout], problems: list[Problem]) -> str:
    """What the step reports when all of it is done again, the update included."""
    faults: list[str] = []
    parts.learner.keep_batch = lambda _step, _rollouts, fault: faults.append(fault)
    try:
        metrics = parts.train_step(step, rollouts, problems).metrics
    except FloatingPointError:
        metrics = {}
    if faults:
        return faults[0]
    numbers = {name: metrics.get(name, math.nan) for name in (names.LOSS, names.GRAD_NORM)}
    return "finite here, " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


@contextmanager
def _first_not_finite(models: dict[str, nn.Module]) -> Iterator[list[str]]:
    """A list that gets the modules whose outputs are not finite, in the order in which they end."""
    seen: list[str] = []

    def check(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
            seen.append(f"{name} ({type(module).__name__})")

    hooks = [
        module.register_forward_hook(partial(check, f"{role}: {name}"))
        for role, model in models.items()
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)


def _not_finite_weights(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if not bool(local_part(weight).isfinite().all())]
