"""Memory by phase: states of real models, hand figures for the paper's pairs, and what must hold for any pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tip_exp.config import machine_rules
from tip_exp.config.schema import RunConfig
from tip_exp.estimate import activations
from tip_exp.estimate.activations import kept_per_layer, largest_micro_batch
from tip_exp.estimate.cards import CARDS, RANKS
from tip_exp.estimate.dry_run import hidden_and_saved_bytes
from tip_exp.estimate.memory import CONTEXT_GIB, PINNED, PROCESS, PROCESS_GIB, Phase, RankMemory, ranks_needed
from tip_exp.estimate.shapes import shape_of
from tip_exp.learner.objective import make_objective
from tip_exp.learner.teacher import Teacher
from tip_exp.losses import materialized, tiling
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
H100 = CARDS[80].gib


@pytest.fixture(autouse=True, scope="module")
def vllm_is_installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine_rules, "find_spec", lambda _: True)
        yield


def gib(tensors: list[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB


def without(phase: Phase, *parts: str) -> float:
    """GiB on the device without some parts."""
    return sum(size for name, size in phase.device.items() if name not in parts)


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
    update = RankMemory(config, None).phases()["update"]
    assert update.host == {PROCESS: PROCESS_GIB}
    teacher = update.device["teacher layers"] + update.device["teacher vocabulary"]
    assert teacher == pytest.approx(gib(list(pair.teacher.module.parameters())))
    assert update.device["student weights"] == pytest.approx(gib(list(pair.student.module.parameters())))
    assert update.device["AdamW"] == pytest.approx(gib(moments))
    assert RankMemory(config, None).trained / GIB == pytest.approx(gib(trained))
    if overrides:  # an update of the adapters has no temporary of the size of a weight
        assert update.device["gradients"] == pytest.approx(gib(trained))


@pytest.mark.parametrize("micro_batch_tokens", [800, 400])
def test_hidden_states_of_a_step_are_counted(tiny_pair: Pair, compose_run: Compose, micro_batch_tokens: int) -> None:
    """Of the teacher; pass 2 recomputes the student's."""
    few = ["learner.prompts_per_step=2", "learner.samples_per_prompt=2", "data.max_prompt_tokens=128"]
    config = compose_run(*few, f"learner.micro_batch_tokens={micro_batch_tokens}")
    rollouts = [Rollout([1] * 200, [False] * 128 + [True] * 72, "length", [])] * 4
    hidden = list(Teacher(tiny_pair, config.learner, Meter(torch.device("cpu"))).hidden(rollouts))
    phases = RankMemory(config, None).phases()
    assert phases["backward"].host["hidden states"] == pytest.approx(gib(hidden))
    assert "hidden states" not in phases["rollout"].host | phases["update"].host


@pytest.mark.parametrize("padded", [True, False])
def test_activations_are_what_autograd_saves(tiny_pair: Pair, padded: bool) -> None:
    """Four sequences of 500 positions; only with padding is a mask saved."""
    lengths = [400, 400, 400, 300 if padded else 400]
    rollouts = [Rollout([1] * (100 + n), [False] * 100 + [True] * n, "length", []) for n in lengths]
    (batch,) = micro_batches(rollouts, 2000, 0, packing=not padded)
    _, saved = hidden_and_saved_bytes(tiny_pair.student, batch)
    shape = shape_of("package:tiny/student", None)
    per_token = kept_per_layer(shape, width=4, mask_length=500 if padded else 0)
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
        ["learner.divergence=clipped_kl"],
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
    num_tokens = 3 * config.data.max_response_tokens
    shapes, models = [], []
    for model in (config.pair.student, config.pair.teacher):
        shape, dtype = shape_of(model.path, None), getattr(torch, model.dtype)
        weight = torch.randn(int(shape.vocab_size), int(shape.hidden), dtype=dtype)
        models.append(LazyLogits(torch.randn(num_tokens, int(shape.hidden), dtype=dtype), Head(weight, len(weight))))
        shapes.append(shape)
    weight = models[0].head.weight.requires_grad_()
    weight.grad = torch.zeros_like(weight)
    kept_mask = torch.arange(num_tokens) < retention * num_tokens
    meter = Meter(torch.device("cpu"))
    meter.count_allocations = True
    with meter.span("loss", allocations=True):
        materialized(*models, kept_mask, make_objective(config.learner, {})(torch.zeros(num_tokens).long()), 0)
    measured = meter.memory()[extra_mib("loss")] * MIB
    student, teacher = shapes
    predicted = activations.materialized_bytes(config, teacher, student, num_tokens, weight.element_size())
    assert predicted == pytest.approx(measured, rel=0.15)


def test_constants_of_the_tiling_are_its_own() -> None:
    for name in ("MAX_ROWS", "GEMM_ELEMENTS", "BLOCK_ELEMENTS", "GROUP"):
        assert getattr(activations, name) == getattr(tiling, name), name


def test_an_evaluation_holds_weights_and_what_sampling_needs(compose_run: Compose) -> None:
    phases = RankMemory(compose_run("experiment=evaluate"), None).phases()
    weights = {"student weights", "teacher layers", "teacher vocabulary"}
    assert set(phases) == {"load", "evaluation"}
    assert set(phases["load"].device) == weights
    assert set(phases["evaluation"].device) == weights | {"KV cache", "sampling"}


def test_sampling_ahead_is_held_while_the_learner_works(compose_run: Compose) -> None:
    """A copy of the student and the KV cache of a step's rollouts, beside what each phase holds without it."""
    plain, ahead = (RankMemory(compose_run(f"rollout.staleness={n}"), None).phases() for n in (0, 1))
    student, sampling = plain["load"].device["student weights"], {"KV cache", "sampling"}
    assert ahead["load"] == plain["load"]
    for name in ("rollout", "teacher", "score", "backward", "update"):
        expected = plain[name].device | {part: plain["rollout"].device[part] for part in sampling}
        assert ahead[name].device == expected | {"sampler's weights": student}, name
    assert ahead["evaluation"].device == plain["evaluation"].device | {"sampler's weights": student}
    on_gpu = RankMemory(compose_run("experiment=tip_qwen3", "rollout.staleness=1"), H100, 2).phases()["backward"]
    assert "sampler's weights" in on_gpu.device and "sampling engine asleep" not in on_gpu.device


def test_the_fullest_micro_batch_is_as_full_as_the_budget(compose_run: Compose) -> None:
    """10,240 positions of a rollout leave 6,144 of 16,384 free, which two of 8,192 fill."""
    config = compose_run("experiment=tip_qwen3")
    assert largest_micro_batch(config, 128) == (2, 8192, 2 * 8192 * 0.8)
    assert largest_micro_batch(config, 1) == (1, 10_240, 8192)
    tools = compose_run("experiment=tip_deepplanning", "data.root=.")  # the learner reads 16,384 of 32,768
    assert largest_micro_batch(tools, 128) == (1, 16_384, 12_288)


# Hand figures, GiB on 80 GB cards: (experiment, ranks, phase, parts left out, expected)
#   8B -> 4B: weights and moments 12 x 4.02e9 + teacher 2 x 8.19e9 = 64.6e9 bytes = 60.2 GiB over the ranks
#   70B -> 8B: 12 x 8.03e9 + 2 x 70.55e9 = 237.5e9 bytes = 221.2 GiB over the ranks
#   its learner at 8: 27.6 + layers' gradients 4 x 6.98e9 / 8 = 3.3, whole float32 gradients of embedding and head
#   4 x 1.05e9 = 3.9, both models' whole matrices 2 x (1.05e9 + 2.1e9) = 5.9
ENGINE = ("sampling engine", "CUDA context")
MICRO_BATCH = (*ENGINE, "sampling engine asleep", "activations", "micro-batch hidden states", "logits and temporaries")
LEARNER = (*MICRO_BATCH, "gathered layers")
HAND = [
    ("tip_qwen3", 2, "rollout", ENGINE, 30),
    ("tip_qwen3", 8, "rollout", ENGINE, 60.2 / 8),
    ("tip_llama", 8, "rollout", ENGINE, 28),
    ("tip_llama", 8, "backward", LEARNER, 39),
    ("tip_llama", 8, "backward", LEARNER, 27.6 + 3.3 + 3.9 + 5.9),
]


@pytest.mark.parametrize(("experiment", "ranks", "phase", "left_out", "expected"), HAND)
def test_the_papers_pairs_by_hand(
    compose_run: Compose, experiment: str, ranks: int, phase: str, left_out: tuple[str, ...], expected: float
) -> None:
    phases = RankMemory(compose_run(f"experiment={experiment}"), H100, ranks).phases()
    assert without(phases[phase], *left_out) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["experiment=tip_qwen3"], 2),
        (["experiment=tip_qwen25"], 2),  # 76.9 GiB on one leave too little of 79.1
        (["experiment=tip_qwen25", "rollout.vllm.gpu_memory_utilization=0.35"], 1),
        (["experiment=tip_llama"], 8),
        (["experiment=tip_llama", "pair.teacher.placement=offload"], 4),
    ],
)
def test_ranks_that_the_papers_pairs_need(compose_run: Compose, overrides: list[str], ranks: int) -> None:
    assert ranks_needed(compose_run(*overrides), H100) == ranks


def test_an_engine_that_its_share_cannot_hold_does_not_fit(compose_run: Compose) -> None:
    """Qwen3-4B in bfloat16 takes 7.5 GiB, the KV cache of 10,240 tokens 1.4; a tenth of 79 GiB is 7.9."""
    share = "rollout.vllm.gpu_memory_utilization={}".format
    memory = RankMemory(compose_run("experiment=tip_qwen3", share(0.1)), H100, 8)
    assert memory.engine_gib() == pytest.approx((7.91, 8.9), abs=0.01)
    assert memory.peak()[1] < H100 and not memory.fits
    assert RankMemory(compose_run("experiment=tip_qwen3", share(0.12)), H100, 8).fits
    longer = RankMemory(compose_run("experiment=tip_qwen3", share(0.12), "eval.max_tokens=38912"), H100, 8)
    assert longer.engine_gib()[1] > 12 and not longer.fits


def test_a_model_that_is_loaded_whole_in_float32_is_converted_on_the_host(compose_run: Compose) -> None:
    """8.19e9 and 4.02e9 parameters of 4 bytes; else a matrix at a time, as files are mapped."""

    def read(ranks: int, *overrides: str) -> float:
        phases = RankMemory(compose_run("experiment=tip_qwen3", *overrides), H100, ranks).phases()
        return phases["load"].host["weights being read"] * GIB

    largest = 4 * 151_936 * 2560
    assert read(1) == read(2) == read(1, LORA, "pair.student.dtype=bfloat16") == largest
    assert read(1, "learner.compute_dtype=float32") == pytest.approx(4 * 4.02e9, rel=0.01)
    assert read(2, "learner.compute_dtype=float32") == largest
    assert read(1, LORA) == read(2, LORA) == pytest.approx(4 * 4.02e9, rel=0.01)
    assert read(1, "pair.teacher.dtype=float32") == pytest.approx(4 * 8.19e9, rel=0.01)
    assert read(2, "pair.teacher.dtype=float32") == 4 * 151_936 * 4096
    # Its pinned layers, counted by themselves, come after it was read and are larger.
    assert read(1, "pair.teacher.dtype=float32", "pair.teacher.placement=offload") == 4 * 151_936 * 4096


def test_an_engine_asleep_frees_its_card(compose_run: Compose) -> None:
    def engine(level: int) -> tuple[float, float]:
        config = compose_run("experiment=tip_qwen3", f"rollout.vllm.sleep_level={level}")
        phase = RankMemory(config, H100, 2).phases()["backward"]
        names = "sampling engine", "sampling engine asleep"
        device, host = (sum(part.get(name, 0) for name in names) for part in (phase.device, phase.host))
        return device, host

    weights = 2 * 4.02e9 / GIB
    assert engine(0) == (pytest.approx(0.4 * H100), 0)
    assert engine(1) == (1.0, pytest.approx(PINNED * weights, rel=0.01))
    assert engine(2) == (1.0, 0)


SETTINGS = st.fixed_dictionaries(
    {
        "experiment": st.sampled_from(["tip_qwen3", "tip_llama", "tip_qwen25"]),
        "pair.student.dtype": st.sampled_from(["float32", "bfloat16"]),
        "learner.compute_dtype": st.sampled_from(["float32", "bfloat16"]),
        "learner.loss_backend": st.sampled_from(["fused", "materialized"]),
        "learner.packing": st.booleans(),
        "learner.activation_checkpointing": st.booleans(),
        "learner.micro_batch_tokens": st.integers(10_240, 100_000),
        "rollout.backend": st.sampled_from(["vllm", "hf"]),
        "selector.retention": st.sampled_from([0.1, 0.5, 0.9]),
        "lora": st.booleans(),
    }
)


@settings(max_examples=5)  # each composes two configs
@given(SETTINGS, st.sampled_from(sorted(CARDS)))
def test_what_must_hold_for_any_run(compose_run: Compose, setting: dict[str, Any], card: int) -> None:
    """More ranks never need more, no part is negative, and offload moves the teacher without changing its size."""
    lora = [LORA] if setting.pop("lora") else []
    overrides = [f"{key}={value}" for key, value in setting.items()] + lora
    resident, offload = (
        compose_run(*overrides, f"pair.teacher.placement={placement}") for placement in ("resident", "offload")
    )
    earlier: dict[str, Phase] = {}
    for ranks in RANKS:
        phases = RankMemory(resident, CARDS[card].gib, ranks).phases()
        for name, phase in phases.items():
            assert min(*phase.device.values(), *phase.host.values()) >= 0
            assert phase.device.keys() & phase.host.keys() <= {"sampling engine asleep"}  # graphs here, weights there
            if name in earlier:
                assert phase.device_gib <= earlier[name].device_gib + 1e-9
                assert phase.host_gib <= earlier[name].host_gib + 1e-9
        earlier = phases
        offloaded = RankMemory(offload, CARDS[card].gib, ranks).phases()
        for name, phase in phases.items():
            moved = phase.device["teacher layers"]
            assert offloaded[name].host["teacher layers"] == pytest.approx(PINNED * moved)
            assert "teacher layers" not in offloaded[name].device
            same = {part: gib for part, gib in phase.device.items() if part != "teacher layers"}
            assert {part: offloaded[name].device[part] for part in same} == same


def test_the_sharded_parts_fall_as_one_over_the_ranks(compose_run: Compose) -> None:
    config = compose_run("experiment=tip_qwen3", "learner.compute_dtype=float32")
    one, eight = (RankMemory(config, H100, ranks).phases()["update"].device for ranks in (1, 8))
    for part in ("student weights", "AdamW", "teacher layers", "teacher vocabulary", "gradients"):
        assert eight[part] == pytest.approx(one[part] / 8)
    replicated = RankMemory(compose_run("experiment=tip_qwen3", "learner.replicas=2"), H100, 8).phases()["update"]
    assert replicated.device["AdamW"] == pytest.approx(one["AdamW"] / 4)
    assert one["CUDA context"] == CONTEXT_GIB
