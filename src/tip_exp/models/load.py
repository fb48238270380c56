"""The pair as loaded: tokenizer, teacher and student, checked against each other before any weight is read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tip_exp.config.schema import ModelConfig, PairConfig
from tip_exp.losses.head import Head
from tip_exp.models.lora import FOLDER as ADAPTER
from tip_exp.models.lora import attach, load_adapter
from tip_exp.models.pair import Model, Pair
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import resolve_model


def load_pair(config: PairConfig, device: torch.device, student_from: Path | None = None) -> Pair:
    """Check tokenizers, vocabularies and stop ids, then load teacher (frozen) and student.

    `student_from`: a checkpoint's folder, to go on from instead of the student's own weights.
    """
    lora = config.student.lora
    if student_from is not None and lora is None:
        student_config = config.student.model_copy(update={"path": str(student_from), "revision": None})
        config = config.model_copy(update={"student": student_config})
    tokenizers = {role: _tokenizer(config, role) for role in ("teacher", "student")}
    widths = {role: _vocab_width(config, role) for role in ("teacher", "student")}
    shared = shared_vocab(tokenizers["teacher"], tokenizers["student"], widths["teacher"], widths["student"])
    stops = {role: _stop_ids(config, role, tokenizers[role]) for role in ("teacher", "student")}
    if stops["teacher"] != stops["student"]:
        raise ConfigError(
            f"pair: the teacher stops at token ids {stops['teacher']}, the student at {stops['student']}; on-policy "
            "distillation then teaches the student never to stop. Use models that share their stop tokens"
        )
    student_tokenizer = tokenizers["student"]
    if not student_tokenizer.chat_template:
        raise ConfigError(f"pair.student.path: the tokenizer of {config.student.path} has no chat template")
    teacher, student = _load(config, "teacher", device, shared), _load(config, "student", device, shared)
    teacher.module.requires_grad_(False)
    if lora is not None:  # a checkpoint's own weights are merged: base and adapter are exact, their sum is rounded
        attach(student.module, lora, config.student.path)
        if student_from is not None:
            load_adapter(student.module, student_from / ADAPTER)
    pad = student_tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else stops["student"][0]
    reload = partial(_load_module, config, "teacher", device)
    return Pair(
        tokenizer=student_tokenizer,
        teacher=teacher,
        student=student,
        stop_ids=stops["student"],
        pad_id=pad,
        chat=config.chat,
        privileged=config.privileged,
        placement=config.teacher.placement,
        reload_teacher=reload,
    )


def shared_vocab(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_width: int, student_width: int
) -> int:
    """Number of token ids that both models have; an error unless every token means the same to both.

    Logits may be wider than the tokenizer (Qwen pads 151,665 tokens to 151,936 or 152,064): the common part is used.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        wrong = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        example = wrong[0]
        raise ConfigError(
            f"pair: teacher and student must share one tokenizer, but {len(wrong)} tokens differ; for example "
            f"{example!r} is id {theirs.get(example)} to the teacher and {ours.get(example)} to the student"
        )
    shared = min(teacher_width, student_width)
    if max(ours.values()) >= shared:
        raise ConfigError(
            f"pair: the tokenizer has ids up to {max(ours.values())}, but the two models share only {shared} logits"
        )
    return shared


def check_context(config: PairConfig, prompt: int, response: int) -> None:
    """Do prompt and response fit into both models' positions? Told before any weight is read."""
    for role in ("teacher", "student"):
        path, options = _source(config, role)
        limit = getattr(AutoConfig.from_pretrained(path, **options).get_text_config(), "max_position_embeddings", None)
        key, longest = "data.max_prompt_tokens", prompt
        if role == "teacher" and config.privileged is not None and config.privileged.max_tokens > prompt:
            key, longest = "pair.privileged.max_tokens", config.privileged.max_tokens
        if limit is not None and longest + response > limit:
            raise ConfigError(
                f"{key} + data.max_response_tokens = {longest + response}, but the {role} {path} has "
                f"{limit} positions; lower one of them"
            )


def _source(config: PairConfig, role: str) -> tuple[str, dict[str, Any]]:
    model: ModelConfig = getattr(config, role)
    path = resolve_model(model.path)
    return str(Path(path).expanduser()) if path.startswith("~") else path, {"revision": model.revision or "main"}


def _tokenizer(config: PairConfig, role: str) -> PreTrainedTokenizerBase:
    path, options = _source(config, role)
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"pair.{role}.path: no tokenizer could be loaded from {path}: {first_line(error)}") from error


def _vocab_width(config: PairConfig, role: str) -> int:
    path, options = _source(config, role)
    try:
        return AutoConfig.from_pretrained(path, **options).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ConfigError(f"pair.{role}.path: no model config in {path}: {first_line(error)}") from error


def _stop_ids(config: PairConfig, role: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Stop ids of the tokenizer and of the model's generation config."""
    path, options = _source(config, role)
    try:
        eos = GenerationConfig.from_pretrained(path, **options).eos_token_id
    except OSError:
        eos = None  # a model need not have one
    stops = {eos} if isinstance(eos, int) else set(eos or [])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ConfigError(
            f"pair.{role}.path: neither the tokenizer nor the generation config of {path} names a stop token"
        )
    return sorted(stops)


def _load(config: PairConfig, role: str, device: torch.device, shared: int) -> Model:
    module = _load_module(config, role, device)
    return Model(module, make_head(module, shared))


def _load_module(config: PairConfig, role: str, device: torch.device) -> PreTrainedModel:
    path, options = _source(config, role)
    dtype = getattr(torch, getattr(config, role).dtype)
    try:
        module = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.attention, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"pair.{role}.path: cannot load {path}: {first_line(error)}") from error
    return module.to(device).eval()  # pyright: ignore[reportArgumentType]  # no dropout: score and gradient must see the same network


def make_head(module: PreTrainedModel, vocab_size: int) -> Head:
    """Take the output head out of a model, and prove on a few tokens that it gives the model's own logits."""
    head = head_of(module, vocab_size)
    probe = torch.arange(4, device=head.weight.device)[None]
    with torch.no_grad():
        expected = module(probe, use_cache=False).logits[0, :, :vocab_size].to(head.dtype)
        got = head.logits(module.base_model(probe, use_cache=False).last_hidden_state[0])
    if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ConfigError(
            f"{type(module).__name__} does more to its logits than scaling or soft-capping: not supported"
        )
    return head


def head_of(module: PreTrainedModel, vocab_size: int) -> Head:
    """A model's output head, unproven.

    Scaling and soft-capping after the last matrix product are read from the model's config; a model that does anything
    else there must be refused, not distilled wrongly: `make_head` does.
    """
    linear = module.get_output_embeddings()
    text_config = module.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        raise ConfigError(f"{type(module).__name__} has no linear output head, so its loss cannot be formed by rows")
    scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
        getattr(text_config, "logits_scaling", None) or 1.0
    )
    return Head(linear.weight, vocab_size, linear.bias, scale, getattr(text_config, "final_logit_softcapping", None))
