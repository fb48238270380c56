"""Where the teacher lives changes no number; between uses it is where the config says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import make_learner, sample_rollouts, train_step
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.models.teacher_offload import TeacherOffloader
from tip_exp.records.meter import Meter

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


def trained(
    pair: Pair, config: RunConfig, scratch: Path | None = None, **changes: Any
) -> tuple[list[dict], list[Tensor]]:
    """Metrics of three steps, without times, and the weights after them."""
    learner = make_learner(pair, config.learner, **changes)
    learner.scratch = scratch
    rollouts = sample_rollouts(pair)
    rows = [train_step(learner, rollouts, step).metrics for step in (1, 2, 3)]
    return rows, [p.detach().clone() for p in pair.student.module.parameters()]


def test_every_placement_gives_the_same_bits(tmp_path: Path, compose_run: Compose) -> None:
    reference, weights = None, []
    for placement in ("resident", "offload"):
        config = compose_run(f"pair.teacher.placement={placement}")
        rows, after = trained(load_pair(config.pair, CPU), config)
        if reference is None:
            reference, weights = rows, after
        assert rows == reference, placement
        assert all(a.equal(b) for a, b in zip(after, weights, strict=True))


def test_two_phase_holds_the_backbone_while_it_reads_and_the_head_always(compose_run: Compose) -> None:
    config = compose_run("pair.teacher.placement=two_phase")
    pair = load_pair(config.pair, CPU)
    module, head = pair.teacher.module, pair.teacher.head
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    loads = []

    def reload():
        loads.append(1)
        assert pair.reload_teacher is not None
        return pair.reload_teacher()

    visitor = TeacherOffloader(module, head, "two_phase", CPU, reload)
    for expected in (0, 1, 2):  # it is there when it is made
        with visitor.on_device(lambda: []):
            assert all(p.equal(before[name]) for name, p in module.named_parameters())
        assert len(loads) == expected
        away = [p for p in module.parameters() if p is not head.weight]
        assert head.weight.numel() > 0 and not any(p.numel() for p in away) and len(away) == len(before) - 1
    assert not any(p.requires_grad for p in module.parameters())


def test_the_teacher_leaves_when_its_reading_fails(compose_run: Compose) -> None:
    pair = load_pair(compose_run().pair, CPU)
    visitor = TeacherOffloader(pair.teacher.module, pair.teacher.head, "two_phase", CPU, pair.reload_teacher)
    with pytest.raises(KeyboardInterrupt), visitor.on_device(lambda: []):
        raise KeyboardInterrupt
    assert sum(p.numel() for p in pair.teacher.module.parameters()) == pair.teacher.head.weight.numel()


def test_what_a_placement_means_here_is_said(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    said = {}
    for placement in ("resident", "offload", "two_phase"):
        pair = replace(tiny_pair, placement=placement)
        said[placement] = str(Teacher(pair, tiny_config.learner, Meter(torch.device("cpu"))).offloader)
    assert "stays resident" in said["offload"] and "the student has nowhere to go" in said["two_phase"]
