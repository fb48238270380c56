"""The closed form of memory against what torch allocates for real models, and against counts on fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.dry_run import hidden_and_saved_bytes
from tip_exp.estimate.memory import PROCESS, PROCESS_GIB, layer_activation_bytes, memory_gib
from tip_exp.estimate.shapes import shape_of
from tip_exp.models.load import load_pair
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout
from tip_exp.utils.units import GIB

Compose = Callable[..., RunConfig]
LORA = "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"


def gib(tensors: list[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB


@pytest.mark.parametrize("overrides", [[], [LORA]], ids=["full", "lora"])
def test_states_are_what_a_real_pair_and_optimizer_hold(compose_run: Compose, overrides: list[str]) -> None:
    config = compose_run(*overrides)
    pair = load_pair(config.pair, torch.device("cpu"))
    trained = [p for p in pair.student.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [m for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    parts = memory_gib(config)
    assert parts[PROCESS] == PROCESS_GIB
    assert parts["teacher weights"] == pytest.approx(gib(list(pair.teacher.module.parameters())))
    assert parts["student weights"] == pytest.approx(gib(list(pair.student.module.parameters())))
    assert parts["gradients"] == pytest.approx(gib(trained))
    assert parts["AdamW"] == pytest.approx(gib(moments))


def test_hidden_states_of_a_step_are_counted(tiny_pair: Pair, compose_run: Compose) -> None:
    """Of both models with several micro-batches, of the teacher only with one."""
    few = ["learner.prompts_per_step=2", "learner.samples_per_prompt=2", "data.max_prompt_tokens=128"]
    rollouts = [Rollout([1] * 200, [False] * 128 + [True] * 72, "length", [])] * 4
    (batch,) = micro_batches(rollouts, 800, tiny_pair.pad_id)
    with torch.no_grad():
        teacher, student = tiny_pair.teacher.hidden(batch), tiny_pair.student.hidden(batch)
    whole = memory_gib(compose_run(*few, "learner.micro_batch_tokens=800"))
    split = memory_gib(compose_run(*few, "learner.micro_batch_tokens=400"))
    assert whole["hidden states"] == pytest.approx(gib([teacher]))
    assert split["hidden states"] == pytest.approx(gib([teacher, student]))


@pytest.mark.parametrize("padded", [True, False])
def test_activations_are_what_autograd_saves(tiny_pair: Pair, padded: bool) -> None:
    """Four sequences of 500 positions; only with padding is a mask saved."""
    lengths = [400, 400, 400, 300 if padded else 400]
    rollouts = [Rollout([1] * (100 + n), [False] * 100 + [True] * n, "length", []) for n in lengths]
    (batch,) = micro_batches(rollouts, 2000, 0)
    _, saved = hidden_and_saved_bytes(tiny_pair.student, batch)
    shape = shape_of("package:tiny/student", None)
    per_token = layer_activation_bytes(shape, width=4, mask_length=500 if padded else 0)
    assert saved == pytest.approx(batch.num_positions * shape.layers * per_token, rel=0.1)


def test_materialized_logits_grow_with_the_kept_tokens(compose_run: Compose) -> None:
    full, half = (
        memory_gib(compose_run("learner.loss_backend=materialized", f"selector.retention={retention}"))["logits"]
        for retention in (1.0, 0.5)
    )
    fused = [memory_gib(compose_run(f"selector.retention={retention}"))["logits"] for retention in (1.0, 0.5)]
    assert full == pytest.approx(2 * half) and fused[0] == fused[1]


def test_an_evaluation_holds_weights_only(compose_run: Compose) -> None:
    assert memory_gib(compose_run("experiment=evaluate")).keys() == {PROCESS, "teacher weights", "student weights"}


def test_an_offloaded_backbone_is_not_counted_beside_larger_parts(compose_run: Compose) -> None:
    """Qwen3-8B in bfloat16 beside a Qwen3-4B whose float32 gradients alone take 15 GiB: only its head counts."""

    def teacher_weights(placement: str, device: str = "auto") -> float:
        config = compose_run("experiment=tip_qwen3", f"pair.teacher.placement={placement}", f"device={device}")
        return memory_gib(config)["teacher weights"]

    head = 151_936 * 4096 * 2 / GIB
    assert teacher_weights("resident") == pytest.approx(8.19e9 * 2 / GIB, rel=0.01)
    assert teacher_weights("offload") == pytest.approx(head)
    assert teacher_weights("offload", device="cpu") == teacher_weights("resident")
