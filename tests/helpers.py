"""Learners, rollouts and single steps on the embedded pair, for the tests of several packages."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.learner import Learner, StepReport
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import make_head
from tip_exp.models.lora import whole_tensor
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.selector.scores import Weight
from tip_exp.selector.selector import Quadrants, Selector
from tip_exp.types import Problem, Rollout, Sampling
from tip_exp.utils.paths import resolve_model

_SAMPLED: dict[bytes, list[Rollout]] = {}  # by what decides them
QUESTIONS = [
    f"{who} has {n} pens. He finds 2. He gives {n % 5 + 2}. How many pens?"
    for n, who in enumerate(["Tom", "Amy", "Ben", "Eva"], 8)
]


def in_float64(pair: Pair) -> Pair:
    """The pair in float64, so that sums in another order agree to many digits."""
    teacher, student = copy.deepcopy(pair.teacher.module).double(), copy.deepcopy(pair.student.module).double()
    models = [Model(module, make_head(module, 406)) for module in (teacher, student)]
    return replace(pair, teacher=models[0], student=models[1])


def permute_ids(model: Path, folder: Path) -> None:
    """Write the same model with its tokens under permuted ids: tokenizer, token ids of its configs, rows of weights."""
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    stored_id = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer["model"]["vocab"] = {token: stored_id[i] for token, i in vocab.items()}
    for added in tokenizer["added_tokens"]:
        added["id"] = stored_id[added["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings |= {key: stored_id[i] for key, i in settings.items() if key.endswith("_token_id") and i is not None}
        (folder / name).write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if "embed_tokens" in name or "lm_head" in name]
    assert names
    for name in names:
        permuted = torch.empty_like(weights[name])
        permuted[stored_id] = weights[name]
        weights[name] = permuted
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sample_rollouts(pair: Pair) -> list[Rollout]:
    """Two responses to each of QUESTIONS; students of equal weights are sampled once in a process."""
    key = hashlib.sha256(f"{pair.student.module.config} {pair.stop_ids} {pair.chat}".encode())
    for name, tensor in pair.student.module.state_dict().items():
        key.update(f"{name} {tensor.dtype}".encode() + tensor.float().numpy().tobytes())
    if key.digest() not in _SAMPLED:
        sampler = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=8)
        prompts = [pair.prompt_ids(question) for question in QUESTIONS]
        _SAMPLED[key.digest()] = sampler.generate(prompts, Sampling(2, 1.0, 1.0, 0, 72), seed=0)
    return copy.deepcopy(_SAMPLED[key.digest()])


def make_learner(
    pair: Pair,
    config: LearnerConfig,
    score: str = "soft_or",
    retention: float = 0.5,
    weight: Weight = "none",
    **changes: Any,
) -> Learner:
    rule = Selector(
        score=score,
        normalizer="none" if score in ("full", "random") else "minmax",
        normalize_over="batch",
        clip={"entropy": 0.98} if score == "soft_or" else {},
        order="positive" if score == "full" else "top",
        rounding="floor",
        scope="rollout",
        retention=retention,
        quadrants=Quadrants(0.3, 0.3),
        weight=weight,
        weight_offset=None,
    )
    return Learner(pair, rule, config.model_copy(update=changes), seed=0, meter=Meter(pair.student.module.device))


def train_step(
    learner: Learner, rollouts: list[Rollout], step: int = 1, problems: list[Problem] | None = None
) -> StepReport:
    """One whole step: teacher's hidden states, then the learner's update."""
    teacher = Teacher(learner.pair, learner.config, learner.meter)
    return learner.step(step, rollouts, teacher.hidden(rollouts, problems))


def gradients_of_step(
    learner: Learner, rollouts: list[Rollout], problems: list[Problem] | None = None
) -> tuple[dict[str, Tensor], StepReport]:
    """The clipped gradients that the optimizer takes in one step. A huge clip and a tiny lr leave them unchanged."""
    gradients: dict[str, Tensor] = {}

    def record(*_: Any) -> None:
        named = learner.pair.student.module.named_parameters()
        gradients.update({name: whole_tensor(p.grad).clone() for name, p in named if p.grad is not None})

    handle = learner.optimizer.register_step_pre_hook(record)
    report = train_step(learner, rollouts, problems=problems)
    handle.remove()
    return gradients, report


def save_random(family: str, folder: Path) -> Path:
    """A random model of a family of transformers, of four experts if it has any, with the embedded pair's tokenizer."""
    source = Path(resolve_model("package:tiny/student"))
    sizes = {"hidden_size": 96, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {key: getattr(AutoConfig.from_pretrained(source), key) for key in ("vocab_size", "eos_token_id")}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder
