"""`tip-exp --dry`: one training step on shapes only, without weights, GPU or network.

Both models are built from fake tensors (torch's shapes and types without storage). The largest micro-batch of a step
goes through the code that a run uses, up to the logits of one tile; activation memory is counted on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tip_exp.config.schema import ModelConfig, RunConfig
from tip_exp.estimate.memory import memory_gib
from tip_exp.estimate.shapes import model_config, shape_of
from tip_exp.losses.head import Head
from tip_exp.losses.tiling import tiling
from tip_exp.models.load import ROLES, check_context, head_of
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.pair import Model
from tip_exp.models.privileged import with_prompt
from tip_exp.selector.selector import budgets
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import resolve_model
from tip_exp.utils.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class _FakeStep:
    """What one step looks like with every rollout at its longest."""

    num_rollouts: int
    num_batches: int
    batch: MicroBatch  # the largest
    teacher_batch: MicroBatch  # differs from `batch` with privileged prompts
    student: Model
    teacher: Model
    student_hidden: Tensor  # (N, D)
    teacher_hidden: Tensor  # (N, D)
    activation_bytes: float


def dry_run(config: RunConfig) -> list[str]:
    """The lines to print; raises ConfigError where shapes do not fit together."""
    shapes, lines = {}, [f"{config.name}: dry run of one step on fake tensors, every response at its longest"]
    for role in ROLES:
        model: ModelConfig = getattr(config.pair, role)
        shapes[role], source = _model_config(role, model)
        lines.append(_row(role, f"{_format_model(model, shapes[role])} (shape from {source})"))
    text_configs = {role: shape.get_text_config() for role, shape in shapes.items()}
    # Prompts are not rendered here, so evaluations are checked by their response length alone.
    check_context(config, config.eval.max_tokens, text_configs)
    widths = {role: text_config.vocab_size for role, text_config in text_configs.items()}
    vocab_size = min(widths.values())
    vocabularies = f"teacher {widths['teacher']:,}, student {widths['student']:,}: {vocab_size:,} shared ids"
    lines += [_row("vocabulary", vocabularies), _row("positions", _format_positions(config, text_configs))]
    activation_bytes = None
    if config.mode == "train":
        step = _fake_step(config, shapes, vocab_size)
        activation_bytes = step.activation_bytes
        lines += _format_step(config, step)
    parts = memory_gib(config, activation_bytes)
    lines.append("memory of the learner's process in GiB, without the sampling engine")
    lines += [f"  {size:10.2f}  {name}" for name, size in parts.items()]
    lines.append(f"  {sum(parts.values()):10.2f}  total")
    return lines


def hidden_and_saved_bytes(model: Model, batch: MicroBatch) -> tuple[Tensor, int]:
    """Hidden states of a batch, (N, D), and the bytes that autograd saves for backward, parameters excluded."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.module.parameters()}
    saved: dict[int, Tensor] = {}  # by storage: a tensor saved by several operations counts once

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            saved[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.hidden(batch)
    return hidden, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _fake_step(config: RunConfig, shapes: dict[str, PretrainedConfig], vocab_size: int) -> _FakeStep:
    learner, data, pair = config.learner, config.data, config.pair
    num_rollouts = learner.prompts_per_step * learner.samples_per_prompt
    mask = [False] * data.max_prompt_tokens + [True] * data.max_response_tokens
    longest = Rollout([0] * len(mask), mask, "length", [])

    def batches_of(rollout: Rollout) -> list[MicroBatch]:
        rollouts = [rollout] * num_rollouts
        return micro_batches(rollouts, learner.micro_batch_tokens, pad_id=0, packing=learner.packing)

    batches = batches_of(longest)
    batch = teacher_batch = batches[0]
    if pair.privileged is not None:
        teacher_batch = batches_of(with_prompt(longest, [0] * pair.privileged.max_tokens))[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher, student = (_fake_model(shapes[r], getattr(pair, r), pair.attention, vocab_size) for r in ROLES)
        with torch.no_grad():
            teacher_hidden = teacher.hidden(teacher_batch)
        student_hidden, activation_bytes = hidden_and_saved_bytes(student, batch)
        text_config = shapes["student"].get_text_config()
        if learner.activation_checkpointing:  # the input of every layer, and all of the one that is recomputed
            input_bytes = batch.num_positions * text_config.hidden_size * student_hidden.element_size()
            layers = text_config.num_hidden_layers
            activation_bytes = layers * input_bytes + activation_bytes / layers
    return _FakeStep(
        num_rollouts,
        len(batches),
        batch,
        teacher_batch,
        student,
        teacher,
        student_hidden,
        teacher_hidden,
        activation_bytes,
    )


def _fake_model(shape: PretrainedConfig, model: ModelConfig, attention: str, vocab_size: int) -> Model:
    """A model without storage; to be called and used inside a FakeTensorMode."""
    module = AutoModelForCausalLM.from_config(
        shape,
        dtype=getattr(torch, model.dtype),
        attn_implementation="eager" if attention == "eager" else "sdpa",  # flash kernels reject fake tensors
    )
    return Model(module, head_of(module, vocab_size))


def _format_step(config: RunConfig, step: _FakeStep) -> list[str]:
    data, batch = config.data, step.batch
    height, width = batch.input_ids.shape
    teacher_height, teacher_width = step.teacher_batch.input_ids.shape
    kept = "as many as are in its quadrant"
    if config.selector.order != "positive":
        per_rollout = budgets(batch.rollout, config.selector.retention, config.selector.rounding)
        kept = f"{int(per_rollout.sum()):,} of {batch.num_tokens:,} response tokens"
    checkpointed = " with checkpointing" if config.learner.activation_checkpointing else ""
    return [
        _row(
            "step",
            f"{step.num_rollouts:,} rollouts of {data.max_prompt_tokens:,} + {data.max_response_tokens:,} tokens in "
            f"{step.num_batches:,} micro-batches",
        ),
        _row("micro-batch", f"{height:,} x {width:,} ids, of which {batch.num_tokens:,} response tokens"),
        _row("teacher reads", f"{teacher_height:,} x {teacher_width:,} ids"),
        _row("hidden", f"teacher {_format_tensor(step.teacher_hidden)}, student {_format_tensor(step.student_hidden)}"),
        _row("kept", f"{config.selector.label}: {kept}"),
        _row("logits", _format_tiles(config, batch.num_tokens, step.student.head, step.teacher.head)),
        _row("activations", f"{step.activation_bytes / GIB:.2f} GiB for the backward pass{checkpointed}, counted"),
    ]


def _format_tiles(config: RunConfig, num_tokens: int, student: Head, teacher: Head) -> str:
    learner, vocab_size = config.learner, student.vocab_size
    if learner.loss_backend == "materialized":
        return f"materialized: {num_tokens:,} x {vocab_size:,} of each model at once"
    # Tiles as on a GPU; on a CPU they are smaller and more.
    tiles = tiling(num_tokens, vocab_size, student.dtype, learner.tile_mib * MIB, whole_rows=False, device="cuda")
    count = len(list(tiles.rows())) * len(list(tiles.columns()))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tile = torch.empty(tiles.height, tiles.width, dtype=student.dtype)
        for head in (student, teacher):
            head.logits_into(tile, torch.empty(tiles.height, head.weight.shape[1]), slice(0, tiles.width))
    return (
        f"at least {count:,} tiles of at most {tiles.height:,} x {tiles.width:,} {_format_dtype(tile)} of each model "
        f"({learner.tile_mib} MiB both)"
    )


def _model_config(role: str, model: ModelConfig) -> tuple[PretrainedConfig, str]:
    """The model's config and its source: a folder, the hub's cache, model_shapes.yaml, or else the hub."""
    config_and_source = model_config(model.path, model.revision)
    if config_and_source is not None:
        values: dict[str, Any] = dict(config_and_source[0])
        return AutoConfig.for_model(values.pop("model_type"), **values), config_and_source[1]
    try:
        return AutoConfig.from_pretrained(resolve_model(model.path), revision=model.revision or "main"), "the hub"
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pair.{role}.path: no config.json for {model.path} in a folder, in the hub's cache or on the hub "
            f"({first_line(error)}); name a folder with a model or a hub id"
        ) from error


def _format_model(model: ModelConfig, shape: PretrainedConfig) -> str:
    text_config, parameters = shape.get_text_config(), shape_of(model.path, model.revision).parameters
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"
    layers = f"{text_config.num_hidden_layers} layers x {text_config.hidden_size}"
    return f"{model.path}: {text_config.model_type}, {layers}, {size} parameters in {model.dtype}"


def _format_positions(config: RunConfig, text_configs: dict[str, PretrainedConfig]) -> str:
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    limits = {role: getattr(text_config, "max_position_embeddings", None) for role, text_config in text_configs.items()}
    known_limits = ", ".join(f"{role} {limit:,}" for role, limit in limits.items() if limit is not None)
    return f"{longest:,} needed; {known_limits}"


def _row(name: str, text: str) -> str:
    return f"  {name:<13} {text}"


def _format_tensor(tensor: Tensor) -> str:
    return f"{' x '.join(f'{size:,}' for size in tensor.shape)} {_format_dtype(tensor)}"


def _format_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
