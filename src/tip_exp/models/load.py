"""Load a pair: context lengths are checked before any weight loads, output heads afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from tip_exp.config.machine_rules import POSITION_KEYS, reads_evaluation
from tip_exp.config.schema import PairConfig, RunConfig
from tip_exp.losses.head import Head, check_same_tokens
from tip_exp.models import lora
from tip_exp.models.packed_attention import check_packing
from tip_exp.models.pair import ChatTokenizer, Model, Pair, Shards
from tip_exp.models.sources import ROLES, SAFE_WEIGHTS, load_part, load_tokenizer, source, text_config
from tip_exp.models.teacher_offload import backbone_of, move_to_host
from tip_exp.models.weight_files import WeightFiles, empty_model
from tip_exp.utils.errors import ConfigError

# Spreads a module over the ranks, in place; with files its parameters are on the meta device.
Shard = Callable[[PreTrainedModel, WeightFiles | None], Shards]
PROBE_TOKENS, PROBE_LOGIT = 16, 1e3
PROBE_ERROR, PROBE_ERROR_16_BIT = 1e-4, 1e-2  # over the largest logit; a 16-bit model rounds its own logits


def load_pair(
    config: PairConfig,
    device: torch.device,
    tokenizer: ChatTokenizer | None = None,
    *,
    shard: dict[str, Shard] | None = None,
    roles: Sequence[str] = ROLES,
    packing: bool = False,
) -> Pair:
    """Load teacher (frozen) and student onto `device`; raises ConfigError if they do not fit together.

    `tokenizer`: the result of `load_tokenizer`, if the caller already has it. `shard`, by role: spreads a model over
    the ranks. Without it the models are whole. `roles`: the models to load; a single one is both models of the pair.
    `packing`: the models must keep the sequences of a packed row apart.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for each sequence length; flash attention does not
    tokenizer = tokenizer or load_tokenizer(config)
    shared = {field.name: getattr(tokenizer, field.name) for field in fields(ChatTokenizer)}
    shards = shard or {}

    def load(role: str) -> Model:
        return _load_model(config, role, device, tokenizer, shards.get(role), packing=packing)

    if len(roles) == 1:
        model = load(roles[0])
        return Pair(**shared, teacher=model, student=model, placement="resident")
    teacher = load("teacher")
    if config.teacher.placement == "offload" and device.type != "cpu" and teacher.shards is None:
        move_to_host(backbone_of(teacher.module, teacher.head))  # before the student takes the memory
    student = load("student")
    with student.whole(), teacher.whole():
        try:
            check_same_tokens(student.head, teacher.head)
        except ValueError as error:
            raise ConfigError(f"pair: {error}") from error
    return Pair(**shared, teacher=teacher, student=student, placement=config.teacher.placement)


def check_context(
    config: RunConfig, longest_eval: int, text_configs: dict[str, PretrainedConfig] | None = None
) -> None:
    """Raise ConfigError if training or evaluation needs more positions than a model or micro-batch has.

    Reads no weights.

    `longest_eval`: tokens of the longest evaluation prompt plus eval.max_tokens.
    `text_configs`: model configs by role, if the caller already has them.
    """
    privileged, budget = config.pair.privileged, config.learner.micro_batch_tokens
    if config.eval.measures_kl and longest_eval > budget:
        raise ConfigError(
            f"eval.sequence_kl=true: learner.micro_batch_tokens ({budget}) cannot hold the longest evaluation prompt + "
            f"eval.max_tokens = {longest_eval}"
        )
    for role in ROLES:
        prompts: dict[str, int] = {}
        if config.mode == "train":
            prompts["data.max_prompt_tokens"] = config.data.max_prompt_tokens
            if role == "teacher" and privileged is not None:
                prompts["pair.privileged.max_tokens"] = privileged.max_tokens
        response = config.data.max_response_tokens
        lengths = {f"{key} + data.max_response_tokens": tokens + response for key, tokens in prompts.items()}
        if reads_evaluation(config, role):
            lengths["the longest evaluation prompt + eval.max_tokens"] = longest_eval
        limit = max_positions(text_configs[role] if text_configs else text_config(config.pair, role))
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


def _stop_at(module: PreTrainedModel, stop_ids: list[int]) -> None:
    """Let the exported student end where its rollouts do; changes nothing where the pair shares its stop tokens."""
    settings = module.generation_config
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:  # transformers loads such settings, but would refuse to save them with the student
        settings = module.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    stops = settings.eos_token_id if settings is not None else None
    if settings is not None and sorted({stops} if isinstance(stops, int) else set(stops or [])) != stop_ids:
        settings.eos_token_id = stop_ids


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
    if module.base_model is module:
        raise ConfigError(
            f"{type(module).__name__} does not name its backbone (base_model_prefix), which the loss needs; choose "
            "another model"
        )

    def scale(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state * factor
        hidden_states.append(output.last_hidden_state[0])

    ids = torch.linspace(0, head.vocab_size - 1, PROBE_TOKENS, device=head.weight.device).long()
    hook = module.base_model.register_forward_hook(scale)
    try:
        expected = module(ids[None], use_cache=False).logits[0, :, : head.vocab_size].to(head.dtype)
    finally:
        hook.remove()
    if not hidden_states:
        raise ConfigError(f"{type(module).__name__} does not call its base model as a module, which the loss needs")
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


def _load_model(
    config: PairConfig,
    role: str,
    device: torch.device,
    tokenizer: ChatTokenizer,
    shard: Shard | None,
    *,
    packing: bool,
) -> Model:
    """One role's model: whole on `device`, or this rank's share of it. A LoRA student gets its adapters."""
    dtype, settings = getattr(torch, getattr(config, role).dtype), config.student.lora if role == "student" else None
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention, **SAFE_WEIGHTS}
    empty = None
    order = tokenizer.teacher_order if role == "teacher" else None
    if shard is not None and settings is None and order is None:  # adapters are drawn on whole layers
        empty = empty_model(
            load_part(AutoConfig, "config", config, role), *source(config, role), dtype, config.attention
        )
    module, files = empty or (load_part(AutoModelForCausalLM, "model", config, role, **options), None)
    if order is not None:
        reorder_vocabulary(module, order)
    if shard is None:
        module = module.to(device)  # pyright: ignore[reportArgumentType]
    module.eval()  # without dropout, statistics and gradients come from the same network
    module.requires_grad_(role == "student")
    if settings is not None:
        lora.attach(module, settings, config.student.path)
    if role == "student":
        _stop_at(module, tokenizer.stop_ids)
    shards = shard(module, files) if shard is not None else None
    with nullcontext() if shards is None else shards.whole():
        head = _with_stop_class(make_head(module, tokenizer.vocab_size), role, tokenizer.stop_class)
        if packing:
            check_packing(Model(module, head), f"pair.{role}.path")
    linear: Any = module.get_output_embeddings()
    return Model(module, replace(head, weight=linear.weight, bias=linear.bias), shards)


@torch.no_grad()
def reorder_vocabulary(module: PreTrainedModel, order: list[int]) -> None:
    """Put row `order[i]` of embedding and output head, tied or not, at row i, in place.

    Raises ConfigError if another parameter may have a row for each token.
    """
    parts: tuple[Any, Any] = (module.get_input_embeddings(), module.get_output_embeddings())
    parameters = {id(parameter): parameter for part in parts for parameter in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in parameters and len(order) in parameter.shape[:1]:
            raise ConfigError(
                f"pair.teacher.path: its tokens have other ids than the student's, and {name} may have a row for each "
                "token as well; choose two models with equal ids"
            )
    for parameter in parameters.values():
        parameter.copy_(parameter[torch.tensor(order, device=parameter.device)])


def _with_stop_class(head: Head, role: str, stop_class: tuple[int, ...]) -> Head:
    try:
        return replace(head, stop_class=stop_class)
    except ValueError as error:
        raise ConfigError(f"pair.stop=class, pair.{role}.path: {error}; use pair.stop=union") from error
