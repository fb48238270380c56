"""`tip-exp --dry`: one training step on shapes only, without weights, GPU or network.

Both models are built from fake tensors (torch's shapes and types without storage). The largest micro-batch of a step
goes through the code that a run uses, up to the logits of one tile; activation memory is counted on the way.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tip_exp.config.schema import ModelConfig, RunConfig
from tip_exp.estimate.activations import largest_micro_batch, trained_lengths
from tip_exp.estimate.cards import CARDS, DEFAULT_CARD
from tip_exp.estimate.memory import RankMemory, ranks_needed, runs_on_cpu, total_ranks
from tip_exp.estimate.shapes import model_config, shape_of
from tip_exp.losses.head import Head
from tip_exp.losses.tiling import tiling
from tip_exp.models.load import check_context, head_of, max_positions
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.pair import Model
from tip_exp.models.privileged import with_prompt
from tip_exp.models.sources import ROLES, SAFE
from tip_exp.selector.selector import budgets
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import resolve_model
from tip_exp.utils.units import GIB, MIB


def dry_run(config: RunConfig) -> list[str]:
    """The lines to print; raises ConfigError where shapes do not fit together."""
    shapes: dict[str, PretrainedConfig] = {}
    rows: dict[str, str] = {}
    for role in ROLES:
        model: ModelConfig = getattr(config.pair, role)
        shapes[role], source = _model_config(role, model)
        rows[role] = f"{_format_model(model, shapes[role])} (shape from {source})"
    text_configs = {role: shape.get_text_config() for role, shape in shapes.items()}
    # Prompts are not rendered here, so evaluations are checked by their response length alone.
    check_context(config, config.eval.max_tokens, text_configs)
    teacher_width, student_width = (text_configs[role].vocab_size for role in ROLES)
    vocab_size = min(teacher_width, student_width)
    rows["vocabulary"] = f"teacher {teacher_width:,}, student {student_width:,}: {vocab_size:,} shared ids"
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    limits = {role: max_positions(text_config) for role, text_config in text_configs.items()}
    known_limits = ", ".join(f"{role} {limit:,}" for role, limit in limits.items() if limit is not None)
    rows["positions"] = f"{longest:,} needed; {known_limits}"
    activation_bytes, what = None, "an evaluation: shapes and memory alone"
    if config.mode == "train":
        what = "one step on fake tensors, in its fullest micro-batch"
        step_rows, activation_bytes = _step(config, shapes, vocab_size)
        rows |= step_rows
    return [
        f"{config.name}: dry run of {what}",
        *(f"  {name:<13} {text}" for name, text in rows.items()),
        *format_memory(config, activation_bytes),
    ]


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


def _step(config: RunConfig, shapes: dict[str, PretrainedConfig], vocab_size: int) -> tuple[dict[str, str], float]:
    """Rows of one step's fullest micro-batch, and the bytes of its activations without checkpointing."""
    learner, data, pair = config.learner, config.data, config.pair
    split = partial(micro_batches, token_budget=learner.micro_batch_tokens, pad_id=0, packing=learner.packing)
    num_rollouts = learner.prompts_per_step * learner.samples_per_prompt
    share = math.ceil(num_rollouts / total_ranks(config))
    sequences, length, num_tokens = largest_micro_batch(config, share)
    response = round(num_tokens / sequences)
    mask = [False] * (length - response) + [True] * response
    rollout = Rollout([0] * length, mask, "length", [])
    batch = teacher_batch = split([rollout] * sequences)[0]
    if pair.privileged is not None:
        teacher_batch = split([with_prompt(rollout, [0] * pair.privileged.max_tokens)] * sequences)[0]
    longest, _ = trained_lengths(config)
    num_batches = math.ceil(share / max(1, learner.micro_batch_tokens // longest))
    with FakeTensorMode(allow_non_fake_inputs=True):
        dtypes = {"teacher": pair.teacher.dtype, "student": pair.student.dtype}
        if learner.compute_dtype == "bfloat16":  # the student's weights are cast for each pass
            dtypes["student"] = learner.compute_dtype
        teacher, student = (_fake_model(shapes[role], dtypes[role], pair.attention, vocab_size) for role in ROLES)
        with torch.no_grad():
            teacher_hidden = teacher.hidden(teacher_batch)
        student_hidden, activation_bytes = hidden_and_saved_bytes(student, batch)
    kept = "every token of a positive score"
    if config.selector.order != "positive":
        per_rollout = budgets(batch.rollout, config.selector.retention, config.selector.rounding)
        kept = f"{int(per_rollout.sum()):,} of {batch.num_tokens:,} response tokens"
    lengths = f"{data.max_prompt_tokens:,} + {data.max_response_tokens:,} tokens"
    return {
        "step": f"{num_rollouts:,} rollouts of up to {lengths}; at their longest {num_batches:,} micro-batches a rank",
        "micro-batch": f"{_format_sizes(batch.input_ids)} ids, of which {batch.num_tokens:,} response tokens",
        "teacher reads": f"{_format_sizes(teacher_batch.input_ids)} ids",
        "hidden": f"teacher {_format_tensor(teacher_hidden)}, student {_format_tensor(student_hidden)}",
        "kept": f"{config.selector.label}: {kept}",
        "logits": _format_tiles(config, batch.num_tokens, student.head, teacher.head),
        "activations": f"{activation_bytes / GIB:.2f} GiB for the backward pass, counted without checkpointing",
    }, activation_bytes


def format_memory(config: RunConfig, activation_bytes: float | None) -> list[str]:
    """A line per phase, with its largest parts; then the peak, and on how many cards it fits."""
    card, ranks = None if runs_on_cpu(config) else CARDS[DEFAULT_CARD], total_ranks(config)
    memory = RankMemory(config, card and card.gib, activation_bytes=activation_bytes)
    hardware = f"{ranks} x {card.name} ({card.gib:.0f} GiB each)" if card else "a CPU"
    lines = [f"memory of a rank on {hardware} in GiB: device, host, largest parts"]
    for name, phase in memory.phases().items():
        largest = sorted([*phase.device.items(), *phase.host.items()], key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{part} {gib:.2f}" for part, gib in largest)
        lines.append(f"  {name:<11} {phase.device_gib:8.2f} {phase.host_gib:8.2f}   {parts}")
    name, gib = memory.peak()
    needed, fits = ranks_needed(config, card.gib) if card else 1, ""
    if card and needed != ranks:
        fits = f"; fits {needed} x {card.name}" if needed else f"; fits no number of {card.name}"
    return [*lines, f"peak {gib:.2f} in {name}{fits}"]


def _fake_model(shape: PretrainedConfig, dtype: str, attention: str, vocab_size: int) -> Model:
    """A model without storage; to be called and used inside a FakeTensorMode."""
    kernel = "eager" if attention == "eager" else "sdpa"  # flash kernels reject fake tensors
    module = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation=kernel)
    return Model(module, head_of(module, vocab_size))


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
    return f"at least {count:,} tiles of at most {_format_tensor(tile)} of each model ({learner.tile_mib} MiB both)"


def _model_config(role: str, model: ModelConfig) -> tuple[PretrainedConfig, str]:
    """The model's config and its source: a folder, the hub's cache, model_shapes.yaml, or else the hub."""
    config_and_source = model_config(model.path, model.revision)
    if config_and_source is not None:
        return AutoConfig.for_model(**config_and_source[0]), config_and_source[1]
    try:
        path, revision = resolve_model(model.path), model.revision or "main"
        return AutoConfig.from_pretrained(path, revision=revision, **SAFE), "the hub"
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


def _format_tensor(tensor: Tensor) -> str:
    return f"{_format_sizes(tensor)} {str(tensor.dtype).removeprefix('torch.')}"


def _format_sizes(tensor: Tensor) -> str:
    return " x ".join(f"{size:,}" for size in tensor.shape)
