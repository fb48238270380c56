"""Load a pair. Tokenizers, vocabularies, stop tokens and context lengths are checked before any weight loads."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tip_exp.config.schema import ModelConfig, PairConfig, RunConfig
from tip_exp.losses.head import Head, check_same_tokens
from tip_exp.models import lora
from tip_exp.models.pair import ChatTokenizer, Model, Pair
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import resolve_model

ROLES = ("teacher", "student")
# Keys of a model's config that limit its positions; the first that is set counts.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
PROBE_TOKENS, PROBE_LOGIT = 16, 1e3
PROBE_ERROR, PROBE_ERROR_16_BIT = 1e-4, 1e-2  # over the largest logit; a 16-bit model rounds its own logits


def load_tokenizer(config: PairConfig) -> ChatTokenizer:
    """The pair's tokenizer, once tokenizers, vocabulary sizes and stop tokens of both models are checked."""
    tokenizers = {role: _load(AutoTokenizer, "tokenizer", config, role) for role in ROLES}
    widths = {role: _text_config(config, role).vocab_size for role in ROLES}
    vocab_size = shared_vocab(tokenizers["teacher"], tokenizers["student"], widths["teacher"], widths["student"])
    stops = {role: _stop_ids(config, role, tokenizers[role]) for role in ROLES}
    if stops["teacher"] != stops["student"]:
        raise ConfigError(
            f"pair: the teacher stops at token ids {stops['teacher']}, the student at {stops['student']}; on-policy "
            "distillation would then teach the student never to stop. Use models that share their stop tokens"
        )
    tokenizer = tokenizers["student"]
    if not tokenizer.chat_template:
        raise ConfigError(f"pair.student.path: the tokenizer of {config.student.path} has no chat template")
    return ChatTokenizer(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        stop_ids=stops["student"],
        pad_id=stops["student"][0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        chat=config.chat,
        privileged=config.privileged,
    )


def load_pair(
    config: PairConfig,
    device: torch.device,
    student_from: Path | None = None,
    tokenizer: ChatTokenizer | None = None,
) -> Pair:
    """Load teacher (frozen) and student onto `device`; raises ConfigError if they do not fit together.

    `student_from`: a checkpoint folder to load the student from instead of pair.student.path.
    `tokenizer`: the result of `load_tokenizer`, if the caller already has it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for each sequence length; flash attention does not
    tokenizer = tokenizer or load_tokenizer(config)
    settings = config.student.lora
    if student_from is not None and settings is None:
        student_config = config.student.model_copy(update={"path": str(student_from), "revision": None})
        config = config.model_copy(update={"student": student_config})
    teacher, student = (_load_model(config, role, device, tokenizer.vocab_size) for role in ROLES)
    teacher.module.requires_grad_(False)
    try:
        check_same_tokens(student.head, teacher.head)
    except ValueError as error:
        raise ConfigError(f"pair: {error}") from error
    if settings is not None:
        lora.attach(student.module, settings, config.student.path)
        if student_from is not None:  # base and adapter are exact; the checkpoint's merged weights are rounded
            lora.load_adapter(student.module, student_from / lora.FOLDER)
    shared = {field.name: getattr(tokenizer, field.name) for field in fields(ChatTokenizer)}
    return Pair(**shared, teacher=teacher, student=student, placement=config.teacher.placement)


def shared_vocab(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_width: int, student_width: int
) -> int:
    """Number of token ids that both models have; raises ConfigError unless each id is the same token for both.

    Logits may be wider than the tokenizer (Qwen pads 151,665 tokens to 151,936 or 152,064): the smaller width counts.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if different := sorted({token for token, _ in student_vocab.items() ^ teacher_vocab.items()}):
        example = different[0]
        raise ConfigError(
            f"pair: teacher and student must share one tokenizer, but {len(different)} tokens differ; for example "
            f"{example!r} is id {teacher_vocab.get(example)} in the teacher and {student_vocab.get(example)} in the "
            "student"
        )
    shared, largest_id = min(teacher_width, student_width), max(student_vocab.values())
    if largest_id >= shared:
        raise ConfigError(
            f"pair: the tokenizer has ids up to {largest_id}, but the two models share only {shared} logits"
        )
    return shared


def check_context(
    config: RunConfig, longest_eval: int, text_configs: dict[str, PretrainedConfig] | None = None
) -> None:
    """Raise ConfigError if training or evaluation needs more positions than a model has; reads no weights.

    `longest_eval`: tokens of the longest evaluation prompt plus eval.max_tokens.
    `text_configs`: model configs by role, if the caller already has them.
    """
    privileged = config.pair.privileged
    for role in ROLES:
        prompts: dict[str, int] = {}
        if config.mode == "train":
            prompts["data.max_prompt_tokens"] = config.data.max_prompt_tokens
            if role == "teacher" and privileged is not None:
                prompts["pair.privileged.max_tokens"] = privileged.max_tokens
        response = config.data.max_response_tokens
        lengths = {f"{key} + data.max_response_tokens": tokens + response for key, tokens in prompts.items()}
        if role == "student" or config.eval.teacher:
            lengths["the longest evaluation prompt + eval.max_tokens"] = longest_eval
        text_config = text_configs[role] if text_configs else _text_config(config.pair, role)
        limit = max_positions(text_config)
        for keys, longest in lengths.items():
            if limit is not None and longest > limit:
                raise ConfigError(
                    f"{keys} = {longest}, but the {role} {getattr(config.pair, role).path} has {limit} positions; "
                    "lower one of them"
                )


def max_positions(text_config: PretrainedConfig) -> int | None:
    """The most positions that a model accepts; None if its config names no limit."""
    limits = (getattr(text_config, key, None) for key in POSITION_KEYS)
    return next((limit for limit in limits if isinstance(limit, int)), None)


def make_head(module: PreTrainedModel, vocab_size: int) -> Head:
    """The model's output head; raises ConfigError unless it reproduces the model's own logits on a few tokens.

    Also on hidden states that make the largest logit PROBE_LOGIT: a soft cap is invisible at small logits.
    """
    head = head_of(module, vocab_size)
    limit = PROBE_ERROR if head.weight.dtype == head.dtype else PROBE_ERROR_16_BIT
    factor = 1.0
    for _ in range(2):
        logits, expected = _probe(module, head, factor)
        excluded = expected.isneginf()
        largest = expected[~excluded].abs().amax() if not bool(excluded.all()) else expected.new_tensor(math.nan)
        error = torch.where(excluded, 0, logits - expected).abs().amax() / largest.clamp(min=1e-3)
        if not (error <= limit and excluded.equal(head.excluded.expand_as(excluded))):
            raise ConfigError(
                f"{type(module).__name__} does more to its logits than scaling or soft-capping as its config names it "
                f"(logit_scale, logits_scaling, final_logit_softcapping): at logits of up to {float(largest):.3g} the "
                f"relative error is {float(error):.2g}; choose another model"
            )
        factor = PROBE_LOGIT / max(float(largest), 1e-3)
    return head


@torch.no_grad()
def _probe(module: PreTrainedModel, head: Head, factor: float) -> tuple[Tensor, Tensor]:
    """Logits by the head and by the model itself, (PROBE_TOKENS, V), once its hidden states are scaled by `factor`."""
    hidden_states: list[Tensor] = []

    def scale(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state * factor
        hidden_states.append(output.last_hidden_state[0])

    ids = torch.linspace(0, head.vocab_size - 1, PROBE_TOKENS, device=head.weight.device).long()
    hook = module.base_model.register_forward_hook(scale)
    try:
        expected = module(ids[None], use_cache=False).logits[0, :, : head.vocab_size].to(head.dtype)
    finally:
        hook.remove()
    return head.logits(hidden_states[0]), expected


def head_of(module: PreTrainedModel, vocab_size: int) -> Head:
    """The output head that the model's config describes; unlike `make_head` for fake tensors too."""
    linear, text_config = module.get_output_embeddings(), module.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        raise ConfigError(f"{type(module).__name__} has no linear output head, which the loss needs")
    scale = getattr(text_config, "logit_scale", None) or 1.0
    divisor = getattr(text_config, "logits_scaling", None) or 1.0
    softcap = getattr(text_config, "final_logit_softcapping", None)
    return Head(linear.weight, vocab_size, linear.bias, scale / divisor, softcap)


def _source(config: PairConfig, role: str) -> tuple[str, str]:
    """Folder or hub id, and revision, of one role's model."""
    model: ModelConfig = getattr(config, role)
    path = resolve_model(model.path)
    return str(Path(path).expanduser()) if path.startswith("~") else path, model.revision or "main"


def _load(loader: Any, what: str, config: PairConfig, role: str, **options: Any) -> Any:
    """`loader.from_pretrained` for one role's model; raises ConfigError if `what` cannot be loaded."""
    path, revision = _source(config, role)
    try:
        return loader.from_pretrained(path, revision=revision, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"pair.{role}.path: cannot load the {what} of {path}: {first_line(error)}") from error


def _text_config(config: PairConfig, role: str) -> PretrainedConfig:
    return _load(AutoConfig, "config", config, role).get_text_config()


def _stop_ids(config: PairConfig, role: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Stop ids of the tokenizer and of the model's generation config, sorted."""
    path, revision = _source(config, role)
    try:
        eos = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:
        eos = None  # generation_config.json is optional
    stops = {eos} if isinstance(eos, int) else set(eos or [])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ConfigError(
            f"pair.{role}.path: neither the tokenizer nor the generation config of {path} names a stop token"
        )
    return sorted(stops)


def _load_model(config: PairConfig, role: str, device: torch.device, vocab_size: int) -> Model:
    dtype = getattr(torch, getattr(config, role).dtype)
    module = _load(AutoModelForCausalLM, "model", config, role, dtype=dtype, attn_implementation=config.attention)
    module = module.to(device).eval()  # eval: without dropout, statistics and gradients come from the same network
    return Model(module, make_head(module, vocab_size))
