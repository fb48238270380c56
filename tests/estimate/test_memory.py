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
from tip_exp.learner.learner import objective
from tip_exp.losses import materialized
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.models.load import load_pair
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import extra_mib
from tip_exp.types import Rollout
from tip_exp.utils.units import GIB, MIB

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


@pytest.mark.parametrize("retention", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(
    "changes",
    [
        ["learner.divergence=reverse_kl"],
        ["learner.divergence=forward_kl"],
        ["learner.divergence=jsd"],
        ["learner.divergence=skew_reverse_kl"],
        ["learner.divergence=skew_forward_kl"],
        ["learner.estimator=topk"],
        ["data.max_response_tokens=16"],  # the gradient of the head is larger than the logits
        ["data.max_response_tokens=16", "pair.student.dtype=bfloat16"],  # … and its weight is copied to float32
    ],
    ids=lambda changes: " ".join(change.split(".")[-1] for change in changes),
)
def test_materialized_logits_take_what_torch_allocates(
    compose_run: Compose, changes: list[str], retention: float
) -> None:
    """Within 15 %: two micro-batches of three rollouts, whose head has a gradient from the first."""
    few = ["learner.loss_backend=materialized", "learner.prompts_per_step=6", "learner.samples_per_prompt=1"]
    few += ["data.max_prompt_tokens=16", "data.max_response_tokens=96"]
    config = compose_run(*few, *changes, "selector=random", f"selector.retention={retention}")
    longest = 16 + config.data.max_response_tokens
    config = config.model_copy(
        update={"learner": config.learner.model_copy(update={"micro_batch_tokens": 3 * longest})}
    )
    num_tokens = 3 * config.data.max_response_tokens
    models = []
    for model in (config.pair.student, config.pair.teacher):
        shape, dtype = shape_of(model.path, None), getattr(torch, model.dtype)
        weight = torch.randn(int(shape.vocab_size), int(shape.hidden), dtype=dtype)
        models.append(LazyLogits(torch.randn(num_tokens, int(shape.hidden), dtype=dtype), Head(weight, len(weight))))
    weight = models[0].head.weight.requires_grad_()
    weight.grad = torch.zeros_like(weight)
    kept_mask = torch.arange(num_tokens) < retention * num_tokens
    meter = Meter(torch.device("cpu"))
    meter.count_allocations = True
    with meter.span("loss", allocations=True):
        materialized(*models, kept_mask, objective(config.learner, torch.zeros(num_tokens).long()), 0)
    measured = meter.memory()[extra_mib("loss")] * MIB / GIB
    assert memory_gib(config)["logits"] == pytest.approx(measured, rel=0.15)


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
