"""A learner's step on tensors that claim to be on CUDA: results of the CPU's step, and a fixed number of waits.

Run by test_step.py in a process of its own, with the guard loaded before torch.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.cuda import pretend, torch_kernels
from tests.cuda.pretend import PretendedTensor, Pretending, on_pretended, to_cpu, waits
from tests.helpers import gradients_of_step, make_learner
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import tip_exp.losses
from tip_exp import loss, select, statistics
from tip_exp.config.schema import LoraConfig, PrivilegedConfig, RunConfig
from tip_exp.learner.learner import StepReport
from tip_exp.learner.teacher import Teacher
from tip_exp.losses import head as head_module
from tip_exp.losses.head import Head
from tip_exp.models import lora
from tip_exp.models.load import head_of
from tip_exp.models.packed_attention import packed_inputs
from tip_exp.models.pair import Model, Pair
from tip_exp.rollout.hf import HfSampler
from tip_exp.selector import scores
from tip_exp.types import Problem, Rollout, Sampling

KERNELS = ("add_tile", "logit_gradient_sums", "mixture_sum", "kl_grad")
MICRO_BATCH = {"micro_batch_tokens": 45}  # two rollouts each
SHAPE: dict[str, Any] = {"vocab_size": 406, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
# Waits of a step: one copy to the host per statistic, the gradient's norm, the loss and the norm of the update.
STATISTICS, UPDATE = len(scores.DIAGNOSTICS), 3
launches: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def pretended_device() -> Iterator[None]:
    """torch.cuda without a device, and the kernels where losses imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: pretend.count_wait("synchronize"))
        patch.setattr(torch.cuda, "Event", Mock)
        for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda *_: 0)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
        has_triton = importlib.util.find_spec("triton") is not None  # then its interpreter runs the kernels
        source = importlib.import_module("tip_exp.losses.kernels") if has_triton else torch_kernels
        module = ModuleType("tip_exp.losses.kernels")
        for name in KERNELS:
            setattr(module, name, recorded(name, on_pretended(getattr(source, name))))
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(tip_exp.losses, "kernels", module, raising=False)
        yield


@pytest.fixture(autouse=True)
def nothing_counted() -> None:
    waits.clear()
    launches.clear()


def recorded(name: str, launch: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        launches.append(name)
        return launch(*args, **kwargs)

    return call


def model(seed: int, *, num_layers: int, dtype: torch.dtype, cuda: bool, adapters: bool = False) -> Model:
    torch.manual_seed(seed)
    module = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=num_layers, tie_word_embeddings=True, **SHAPE))
    module = module.to(dtype).eval()
    if adapters:
        lora.attach(module, LoraConfig(rank=2, alpha=4, target_modules="all-linear"), "none")
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # starts at 0, where lora_A has no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    if cuda:
        pretend.to_cuda(module)
    return Model(module, head_of(module, SHAPE["vocab_size"]))


def make_pair(
    tiny_pair: Pair,
    *,
    cuda: bool,
    num_layers: int = 1,
    teacher: torch.dtype = torch.float32,
    student: torch.dtype = torch.float32,
    adapters: bool = False,
    privileged: bool = False,
) -> Pair:
    models = {
        "teacher": model(1, num_layers=num_layers, dtype=teacher, cuda=cuda),
        "student": model(2, num_layers=num_layers, dtype=student, cuda=cuda, adapters=adapters),
    }
    models["teacher"].module.requires_grad_(False)
    settings = PrivilegedConfig(template="{prompt} {answer}", max_tokens=64) if privileged else None
    return replace(tiny_pair, privileged=settings, **models)


def random_rollouts(count: int, response: int) -> list[Rollout]:
    """Prompts of 5 to 7 random tokens, responses of `response` or more."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(count):
        lengths = 5 + i % 3, response + i
        ids = torch.randint(3, 400, (sum(lengths),), generator=generator).tolist()
        rollouts.append(Rollout(ids, [False] * lengths[0] + [True] * lengths[1], "stop", [-6.0] * lengths[1]))
    return rollouts


def step(
    tiny_pair: Pair,
    tiny_config: RunConfig,
    rollouts: list[Rollout],
    pair: dict[str, Any],
    learner: dict[str, Any],
    cuda: bool,
) -> tuple[dict[str, Tensor], StepReport]:
    """Gradients, on the CPU, and report of one step; the first of these processes."""
    made = make_pair(tiny_pair, cuda=cuda, **pair)
    changes = {"grad_clip": 1e9, "lr": 1e-30, **learner}
    problems = [Problem(str(i), f"What is {i}?", str(i)) for i in range(len(rollouts))]
    gradients, report = gradients_of_step(make_learner(made, tiny_config.learner, **changes), rollouts, problems)
    return {name: to_cpu(gradient) for name, gradient in gradients.items()}, report


BF16 = torch.bfloat16
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of the pair and of the learner
    "packed": ({}, {}),
    "padded": ({}, {"packing": False}),
    "micro_batches": ({}, MICRO_BATCH),
    "checkpointing": ({}, {"activation_checkpointing": True, **MICRO_BATCH}),
    "materialized": ({}, {"loss_backend": "materialized", **MICRO_BATCH}),
    "bf16_teacher": ({"teacher": BF16}, {}),
    "bf16_student": ({"teacher": BF16, "student": BF16}, MICRO_BATCH),
    "topk": ({}, {"estimator": "topk"}),
    "sampled_k1": ({}, {"estimator": "sampled_k1", "loss_backend": "materialized"}),
    "sampled_k1_fused": ({}, {"estimator": "sampled_k1"}),
    "forward_kl": ({}, {"divergence": "forward_kl", "weight": "score"}),
    "jsd": ({}, {"divergence": "jsd", **MICRO_BATCH}),
    "few_statistics": ({}, {"diagnostics_every": 0, "score": "random"}),
    "lora": ({"adapters": True}, MICRO_BATCH),
    "privileged": ({"privileged": True}, MICRO_BATCH),
}

WAITS = {
    "padded": STATISTICS + UPDATE + 4,  # transformers' mask: twice in each of two forward passes, four more per batch
    "few_statistics": 1 + UPDATE,
    "privileged": STATISTICS + UPDATE + 1,  # the check that teacher and student read the same responses
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_gives_the_results_of_the_cpu(tiny_pair: Pair, tiny_config: RunConfig, name: str) -> None:
    pair, learner = VARIANTS[name]
    if pair.get("adapters"):
        pytest.importorskip("peft")
    rollouts = random_rollouts(4, 12)
    expected, expected_report = step(tiny_pair, tiny_config, rollouts, pair, learner, cuda=False)
    with Pretending():
        gradients, report = step(tiny_pair, tiny_config, rollouts, pair, learner, cuda=True)
    assert gradients.keys() == expected.keys() != set()
    # The CPU converts a 16-bit head's inputs to float32, CUDA multiplies them in 16 bits.
    limit = 3e-2 if BF16 in pair.values() else 1e-4
    for parameter, gradient in expected.items():
        error = float((gradients[parameter] - gradient).norm() / gradient.norm())
        assert error < limit, (parameter, error)
    assert report.metrics == pytest.approx(expected_report.metrics, rel=limit, abs=limit)
    assert report.selection.kept_mask.equal(expected_report.selection.kept_mask)
    assert sum(waits.values()) == WAITS.get(name, STATISTICS + UPDATE), waits


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_float32_attention_repeats_the_keys_of_a_group(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch 2.13 has no kernel for it but the one that keeps a T x T matrix; flash attention takes groups."""
    repeated: list[bool] = []

    def recorded_sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        repeated.append(key.shape[1] == value.shape[1] == query.shape[1])
        return sdpa(query, key, value, **options)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded_sdpa)
    ids = torch.arange(3, 10)[None]
    with Pretending(), torch.no_grad():
        module = model(1, num_layers=1, dtype=dtype, cuda=True).module
        inputs = packed_inputs(module, (3, 4), pretend.CUDA)
        module.model(ids.to("cuda"), use_cache=False, **inputs)
    assert repeated == [dtype == torch.float32] * 2


def test_the_library_selects_on_cuda(tiny_pair: Pair) -> None:
    """statistics, select and loss, as the loops of docs/integrations.md call them."""
    torch.manual_seed(0)
    ids, sequence, hidden = torch.randint(3, 400, (12,)), torch.tensor([4] * 5 + [2] * 7), torch.randn(2, 12, 32)

    def kept_and_loss(*, cuda: bool) -> tuple[Tensor, float]:
        pair = make_pair(tiny_pair, cuda=cuda)
        models = pair.student.module, pair.teacher.module
        where = (lambda tensor: PretendedTensor(tensor.clone())) if cuda else torch.clone
        student, teacher, tokens, sequences = map(where, (*hidden, ids, sequence))
        stats = statistics(student, teacher, *models, tokens, statistics={"entropy", "reverse_kl"})
        kept = select(stats | {"sequence": sequences}, "soft_or", retention=0.5).kept
        value = loss(student.requires_grad_(), teacher, *models, kept, sequence=sequences)
        value.backward()
        return to_cpu(kept), float(value.detach())

    expected = kept_and_loss(cuda=False)
    with Pretending():
        kept, value = kept_and_loss(cuda=True)
    assert kept.equal(expected[0]) and value == pytest.approx(expected[1], rel=1e-4)


def test_the_step_launches_the_kernels(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    with Pretending():
        step(tiny_pair, tiny_config, random_rollouts(4, 12), {}, {}, cuda=True)
    assert launches == ["add_tile", "logit_gradient_sums", "mixture_sum", "kl_grad"]


SIZES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # rollouts, response tokens, changes
    "more_tokens": (6, 20, {}, {}),
    "more_parameters": (4, 12, {"num_layers": 3}, {}),
    "more_micro_batches": (6, 12, {}, MICRO_BATCH),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_host_waits_as_often_at_any_size(tiny_pair: Pair, tiny_config: RunConfig, size: str) -> None:
    count, response, *changes = SIZES[size]
    with Pretending():
        _, report = step(tiny_pair, tiny_config, random_rollouts(count, response), *changes, cuda=True)
    assert sum(waits.values()) == STATISTICS + UPDATE, waits
    assert int(report.tokens.micro_batch.max()) == (2 if size == "more_micro_batches" else 0)


def test_the_hf_sampler_waits_per_position_not_per_prompt(tiny_pair: Pair) -> None:
    prompts = [[7, 8, 9, 10], [11, 12], [13]] * 2

    def sample(*, cuda: bool) -> list[list[int]]:
        module = make_pair(tiny_pair, cuda=cuda).student.module
        sampler = HfSampler(module, stop_ids=list(range(100)), pad_id=0, batch_size=6)
        return [rollout.token_ids for rollout in sampler.generate(prompts, Sampling(2, 1.0, 0.9, 50, 6), seed=0)]

    expected = sample(cuda=False)
    with Pretending():
        assert sample(cuda=True) == expected
    assert len({len(ids) for ids in expected}) > 3, "some stop early"
    assert sum(waits.values()) <= 2 * (5 * 6 + 7), waits  # batches, each position, the results


def test_flash_attention_gets_the_bounds_of_packed_sequences() -> None:
    module: Any = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    with Pretending():
        inputs = packed_inputs(module, (3, 1, 2), pretend.CUDA)
    assert not waits
    assert inputs["max_length_q"] == inputs["max_length_k"] == 3
    for name, values in (("cu_seq_lens_q", [0, 3, 4, 6]), ("cu_seq_lens_k", [0, 3, 4, 6])):
        assert isinstance(inputs[name], PretendedTensor) and to_cpu(inputs[name]).tolist() == values
    assert to_cpu(inputs["position_ids"]).tolist() == [[0, 1, 2, 0, 0, 1]]


def test_the_teacher_alone_never_waits(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    with Pretending():
        learner = make_learner(make_pair(tiny_pair, cuda=True), tiny_config.learner, **MICRO_BATCH)
        hidden = Teacher(learner.pair, learner.config, learner.meter).hidden(random_rollouts(6, 12))
        assert not waits
        assert all(isinstance(tensor, PretendedTensor) for tensor in hidden)


def on_cuda(values: Any) -> Tensor:
    return PretendedTensor(torch.tensor(values))


@pytest.mark.parametrize(
    "operation",
    [
        lambda: on_cuda(1.0).item(),
        lambda: bool(on_cuda([1.0]) > 0),
        lambda: on_cuda([1, 0]).nonzero(),
        lambda: on_cuda([1, 2])[on_cuda([True, False])],
        lambda: on_cuda([1, 2]).cpu(),
        lambda: on_cuda([1, 2]).to("cpu", non_blocking=True),
        lambda: on_cuda([1, 2]).tolist(),
        lambda: on_cuda([1, 2]).unique(),
        lambda: torch.bincount(on_cuda([1, 2])),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.tensor([1, 2]).to("cuda", non_blocking=True),  # not pinned
        lambda: on_cuda([1, 2])[torch.tensor([0])],
        lambda: torch.equal(on_cuda([1]), on_cuda([1])),
    ],
)
def test_a_wait_is_counted(operation: Any) -> None:
    with Pretending():
        operation()
    assert sum(waits.values()) == 1, waits


def test_what_needs_no_wait_is_not_counted() -> None:
    with Pretending():
        values, mask = on_cuda([1.0, 2.0]), on_cuda([True, False])
        values[mask] = 0
        moved = torch.tensor([1, 0]).pin_memory().to("cuda", non_blocking=True)
        values.sort().values[moved] += torch.arange(2, device="cuda")
        host = torch.empty(2, pin_memory=True)
        host.copy_(values, non_blocking=True)
        torch.where(mask, values, torch.tensor(3.0))  # 0-d
    assert not waits


def test_tensors_on_two_devices_raise() -> None:
    with Pretending(), pytest.raises(RuntimeError, match="same device"):
        on_cuda([1, 2]) + torch.tensor([1, 2])
    with Pretending(), pytest.raises(RuntimeError, match="same device"):
        torch.tensor([1, 2])[on_cuda([0])]


def test_a_16_bit_head_takes_its_gradient_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "PRODUCT_ROWS", 3)
    torch.manual_seed(0)
    weight, hidden, grad = torch.randn(10, 4).bfloat16(), torch.randn(5, 4), torch.randn(5, 7)
    for cuda in (False, True):
        parameter, *inputs, hidden_grad = (
            PretendedTensor(t.clone()) if cuda else t.clone() for t in (weight, hidden, grad, torch.zeros(5, 4))
        )
        parameter.requires_grad_()
        Head(parameter, 10).backward(*inputs, hidden_grad, slice(2, 9))
        rounded = grad.bfloat16().float()
        torch.testing.assert_close(to_cpu(hidden_grad), rounded @ weight[2:9].float(), rtol=2e-2, atol=2e-2)
        assert parameter.grad is not None
        weight_grad = torch.zeros(10, 4)
        weight_grad[2:9] = rounded.T @ hidden.bfloat16().float()
        torch.testing.assert_close(to_cpu(parameter.grad).float(), weight_grad, rtol=2e-2, atol=2e-2)


def test_copies_of_a_module_keep_tied_weights(tiny_pair: Pair) -> None:
    module = pretend.to_cuda(copy.deepcopy(tiny_pair.student.module))
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight  # pyright: ignore
