"""`tip-exp --dry`: one step of a run on shapes alone, before anybody pays for weights or a GPU.

Both models are built without storage (torch's fake tensors: shapes and types on the meta device), and the longest
micro-batch of a step goes through the very code a run uses, up to the logits of one tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tip_exp.config.schema import ModelConfig, RunConfig
from tip_exp.estimate.shapes import model_config, shape_of
from tip_exp.estimate.time import memory
from tip_exp.losses.head import Head
from tip_exp.losses.tiling import tiling
from tip_exp.models.load import head_of
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.pair import Model
from tip_exp.models.privileged import with_prompt
from tip_exp.selector.selector import budgets
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import resolve_model
from tip_exp.utils.units import GIB, MIB


def dry_run(config: RunConfig) -> list[str]:
    """The lines to print; a ConfigError where the shapes do not fit together."""
    lines = [f"{config.name}: dry run of one step, on meta tensors, every response at its longest"]
    configs = {role: _config(role, getattr(config.pair, role)) for role in ("teacher", "student")}
    for role, (shape, source) in configs.items():
        lines.append(_row(role, f"{_told(getattr(config.pair, role), shape)} (shape from {source})"))
    widths = {role: shape.get_text_config().vocab_size for role, (shape, _) in configs.items()}
    shared = min(widths.values())
    lines.append(
        _row("vocabulary", f"teacher {widths['teacher']:,}, student {widths['student']:,}: {shared:,} shared ids")
    )
    lines.append(_row("positions", _positions(config, {role: shape for role, (shape, _) in configs.items()})))
    if config.mode == "train":
        lines += _step(config, {role: shape for role, (shape, _) in configs.items()}, shared)
    lines.append("memory of the learner's process, GiB (tip-plan's forecast; without the sampling engine's)")
    parts = memory(config)
    lines += [f"  {size:10.2f}  {name}" for name, size in parts.items()]
    lines.append(f"  {sum(parts.values()):10.2f}  together")
    return lines


def activations(model: Model, batch: MicroBatch) -> tuple[Tensor, int]:
    """Hidden states of a batch, and the bytes that their backward pass keeps, weights apart; on fake tensors."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.module.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: what several operations keep is there once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(batch)
    return hidden, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def build(shape: PretrainedConfig, model: ModelConfig, attention: str, vocab_size: int) -> Model:
    """A model without storage; call it, and use what it returns, under a FakeTensorMode."""
    module = AutoModelForCausalLM.from_config(
        shape,
        dtype=getattr(torch, model.dtype),
        attn_implementation="eager" if attention == "eager" else "sdpa",  # flash kernels know no fake tensors
    )
    return Model(module, head_of(module, vocab_size))


def _step(config: RunConfig, shapes: dict[str, PretrainedConfig], shared: int) -> list[str]:
    learner, data, pair = config.learner, config.data, config.pair
    rollouts = learner.prompts_per_step * learner.samples_per_prompt
    prompt, response = data.max_prompt_tokens, data.max_response_tokens
    longest = Rollout([0] * (prompt + response), [False] * prompt + [True] * response, "length", [])
    batches = micro_batches([longest] * rollouts, learner.micro_batch_tokens, pad_id=0, packing=learner.packing)
    first = batches[0]
    read = first  # by the teacher, unless a self pair's prompt is longer
    if pair.privileged is not None:
        reads = with_prompt(longest, [0] * pair.privileged.max_tokens)
        read = micro_batches([reads] * rollouts, learner.micro_batch_tokens, pad_id=0, packing=learner.packing)[0]
    height, width = first.input_ids.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = {role: build(shapes[role], getattr(pair, role), pair.attention, shared) for role in shapes}
        models["teacher"].module.requires_grad_(False)
        with torch.no_grad():
            teacher = models["teacher"].hidden(read)
        student, counted = activations(models["student"], first)
    recomputed = ", less what checkpointing computes again" if learner.activation_checkpointing else ""
    kept = "as many as are in its quadrant"
    if config.selector.order != "positive":
        per_rollout = budgets(first.rollout, config.selector.retention, config.selector.rounding)
        kept = f"{int(per_rollout.sum()):,} of {first.num_tokens:,} rows"
    return [
        _row("step", f"{rollouts:,} rollouts of {prompt:,} + {response:,} tokens in {len(batches):,} micro-batches"),
        _row("micro-batch", f"{height:,} x {width:,} ids, {first.num_tokens:,} of them response tokens (the mask)"),
        _row("teacher reads", "{:,} x {:,} ids".format(*read.input_ids.shape)),
        _row("hidden", f"teacher {_shape(teacher)}, student {_shape(student)}"),
        _row("kept", f"{config.selector.label}: {kept}"),
        _row("logits", _tiles(config, first.num_tokens, models["student"].head, models["teacher"].head)),
        _row("activations", f"{counted / GIB:.2f} GiB kept for the backward pass, counted on these shapes{recomputed}"),
    ]


def _tiles(config: RunConfig, num_tokens: int, student: Head, teacher: Head) -> str:
    learner, vocab = config.learner, student.vocab_size
    if learner.loss_backend == "materialized":
        return f"materialized: {num_tokens:,} x {vocab:,} of each model at once"
    # As on a GPU; where a cache is to be kept to there are more.
    cut = tiling(num_tokens, vocab, student.dtype, learner.tile_mib * MIB, whole_rows=False, device="cuda")
    count = len(list(cut.rows())) * len(list(cut.columns()))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tile = torch.empty(cut.height, cut.width, dtype=student.dtype)
        for head in (student, teacher):
            head.logits_into(tile, torch.empty(cut.height, head.weight.shape[1]), slice(0, cut.width))
    return (
        f"{count:,} or more tiles of {cut.height:,} x {cut.width:,} {_type(tile)} of each model at most "
        f"({learner.tile_mib} MiB both)"
    )


def _config(role: str, model: ModelConfig) -> tuple[PretrainedConfig, str]:
    """The model's config: a folder's or the hub cache's whole, or the sizes our table knows."""
    found = model_config(model.path, model.revision)
    if found is not None:
        values: dict[str, Any] = dict(found[0])
        return AutoConfig.for_model(values.pop("model_type"), **values), found[1]
    try:
        return AutoConfig.from_pretrained(resolve_model(model.path), revision=model.revision or "main"), "the hub"
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pair.{role}.path: the shape of {model.path} is not known (no folder with a config.json, not in the hub's "
            f"cache, and the hub gave none: {str(error).strip().splitlines()[0]})"
        ) from error


def _told(model: ModelConfig, shape: PretrainedConfig) -> str:
    text, parameters = shape.get_text_config(), shape_of(model.path, model.revision).parameters
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"
    sizes = f"{text.num_hidden_layers} layers x {text.hidden_size}"
    return f"{model.path}: {text.model_type}, {sizes}, {size} parameters in {model.dtype}"


def _positions(config: RunConfig, shapes: dict[str, PretrainedConfig]) -> str:
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    limits: dict[str, int] = {}
    for role, shape in shapes.items():
        limit = getattr(shape.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"data.max_prompt_tokens + data.max_response_tokens = {longest}, but the {role} "
                f"{getattr(config.pair, role).path} has {limit} positions; lower one of them"
            )
        if limit is not None:
            limits[role] = limit
    return f"{longest:,} needed; " + ", ".join(f"{role} {limit:,}" for role, limit in limits.items())


def _row(name: str, text: str) -> str:
    return f"  {name:<13} {text}"


def _shape(tensor: Tensor) -> str:
    return f"{' x '.join(f'{size:,}' for size in tensor.shape)} {_type(tensor)}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
