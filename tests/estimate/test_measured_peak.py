"""Predicted memory of every phase against what torch allocates for a step of random small models on a CPU."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import PROCESS, RankMemory
from tip_exp.learner.learner import Learner
from tip_exp.learner.selectors import make_selector
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import head_of
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler, make_rollout
from tip_exp.types import Sampling
from tip_exp.utils.units import GIB

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")
SCORED, LAST_BACKWARD = "scored", "last backward"  # marks on the timeline of a step


def random_setting(seed: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Both models' configs, and the overrides of a run whose logits, weights and activations are of similar size."""
    draw = random.Random(seed)
    kind, vocab_size = draw.choice(["qwen3", "llama", "qwen2"]), draw.choice([512, 1024, 1536])
    shapes = {}
    for role in ("teacher", "student"):
        heads = draw.choice([4, 8])
        shapes[role] = {
            "model_type": kind,
            "hidden_size": heads * draw.choice([8, 12, 16]),
            "intermediate_size": draw.choice([96, 160, 256]),
            "num_hidden_layers": draw.choice([1, 2, 4]),
            "num_attention_heads": heads,
            "num_key_value_heads": heads // draw.choice([1, 2]),
            "head_dim": None,
            "vocab_size": vocab_size,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": draw.choice([True, False]),
        }
        shapes[role]["head_dim"] = shapes[role]["hidden_size"] // heads
    prompt, response = draw.choice([16, 48]), draw.choice([24, 48, 72])
    rollouts, at_once = draw.choice([(8, 2), (8, 4), (6, 6), (9, 3)])  # of a step, of a micro-batch
    divergence = draw.choice(["reverse_kl", "forward_kl", "jsd"])
    retention = draw.choice([0.1, 0.5, 1.0])
    overrides = [
        f"data.max_prompt_tokens={prompt}",
        f"data.max_response_tokens={response}",
        f"learner.prompts_per_step={rollouts}",
        "learner.samples_per_prompt=1",
        f"learner.micro_batch_tokens={at_once * (prompt + response)}",
        f"learner.packing={draw.choice([True, False])}",
        f"learner.activation_checkpointing={draw.choice([True, False])}",
        f"learner.loss_backend={draw.choice(['fused', 'materialized'])}",
        f"learner.divergence={divergence}",
        f"learner.tile_mib={draw.choice([1, 2])}",
        "selector=random",
        f"selector.retention={retention}",
        f"pair.teacher.dtype={draw.choice(['float32', 'bfloat16'])}",
        "rollout.max_logprob_mismatch.max=100",
    ]
    return shapes, overrides


class MarkingMeter(Meter):
    """Marks on a profile's timeline where each span of scoring ends."""

    @contextmanager
    def span(self, name: str, *, allocations: bool = False) -> Iterator[None]:
        with super().span(name, allocations=allocations):
            yield
        if name == "score":
            with record_function(SCORED):
                pass


def peaks(profiled: profile, *marks: str) -> list[int]:
    """The highest sum of torch's allocations up to the last event of each mark, and from there to the end, bytes."""
    events = profiled.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    ends = [max(event.start_ns() for event in events if event.name() == mark) for mark in marks]
    allocations = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    total, highest = 0, [0] * (len(marks) + 1)
    for event in allocations:
        total += event.nbytes()
        part = sum(event.start_ns() > end for end in ends)
        highest[part] = max(highest[part], total)
    return highest


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def profiled(call: Callable[[], Any]) -> tuple[Any, profile]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    return result, recorded


def measured_gib(config: RunConfig, pair: Pair, *, with_rollout: bool) -> dict[str, float]:
    """GiB of torch's allocations at the peak of each phase of the second step; the first makes AdamW's moments."""
    meter = MarkingMeter(CPU)
    learner = Learner(pair, make_selector(config), config.learner, seed=0, meter=meter)
    teacher = Teacher(pair, config.learner, meter)
    data, count = config.data, config.learner.prompts_per_step
    prompts = [[1] * (data.max_prompt_tokens - (i == 0)) for i in range(count)]  # one is shorter: padding
    rollouts = [make_rollout(prompt, [2] * data.max_response_tokens, [], stopped=False) for prompt in prompts]
    learner.step(1, rollouts, teacher.hidden(rollouts))

    def mark(*_: Any) -> None:
        with record_function(LAST_BACKWARD):
            pass

    learner.optimizer.register_step_pre_hook(mark)
    hidden, teacher_profile = profiled(lambda: teacher.hidden(rollouts))
    _, learner_profile = profiled(lambda: learner.step(2, rollouts, hidden))
    scored, backward, update = peaks(learner_profile, SCORED, LAST_BACKWARD)
    sizes = {"teacher": peaks(teacher_profile)[0], "score": scored, "backward": backward, "update": update}
    for name in ("score", "backward"):
        sizes[name] += size(hidden)
    if with_rollout:
        sampler = HfSampler(pair.student.module, stop_ids=[pair.vocab_size], pad_id=0, batch_size=count)
        sampling = Sampling(1, 1.0, 1.0, 0, data.max_response_tokens)
        _, rollout_profile = profiled(lambda: sampler.generate(prompts, sampling, seed=0))
        sizes["rollout"] = peaks(rollout_profile)[0]
    student = size(pair.student.module.parameters())
    held = size(pair.teacher.module.parameters()) + 3 * student  # weights and two moments
    return {name: (held + size) / GIB for name, size in sizes.items()}


def case(seed: int, tmp_path: Path, tiny_pair: Pair, compose_run: Compose) -> tuple[dict[str, float], dict[str, float]]:
    """GiB by phase, predicted and measured, of the random setting `seed`."""
    shapes, overrides = random_setting(seed)
    torch.manual_seed(seed)
    for role, shape in shapes.items():
        folder = tmp_path / role
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape))
        overrides.append(f"pair.{role}.path={folder}")
    config = compose_run(*overrides)
    models = {}
    for role, shape in shapes.items():
        dtype = getattr(torch, getattr(config.pair, role).dtype)
        module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape), dtype=dtype, attn_implementation="sdpa"
        )
        models[role] = Model(module.eval(), head_of(module, shape["vocab_size"]))
    models["teacher"].module.requires_grad_(False)
    pair = replace(tiny_pair, vocab_size=shapes["student"]["vocab_size"], **models)
    phases = RankMemory(config, None, backend="hf").phases()
    predicted = {name: phase.gib - phase.host[PROCESS] for name, phase in phases.items()}
    return predicted, measured_gib(config, pair, with_rollout=seed % 4 == 0)


@pytest.mark.parametrize("seed", range(16))
def test_predicted_memory_is_what_torch_allocates(
    seed: int, tmp_path: Path, tiny_pair: Pair, compose_run: Compose
) -> None:
    predicted, measured = case(seed, tmp_path, tiny_pair, compose_run)
    peak = max(measured.values())
    assert max(predicted[name] for name in measured) == pytest.approx(peak, rel=0.1)
    assert {name: predicted[name] for name in measured} == pytest.approx(measured, abs=0.1 * peak)


def test_the_settings_cover_what_changes_memory() -> None:
    overrides = {line for seed in range(16) for line in random_setting(seed)[1]}
    for key, values in {
        "learner.loss_backend": ["fused", "materialized"],
        "learner.packing": [True, False],
        "learner.activation_checkpointing": [True, False],
        "learner.divergence": ["reverse_kl", "forward_kl", "jsd"],
        "selector.retention": [0.1, 0.5, 1.0],
        "pair.teacher.dtype": ["float32", "bfloat16"],
    }.items():
        assert {f"{key}={value}" for value in values} <= overrides
