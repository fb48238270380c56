"""Peak memory of the learner's process from a config alone: a closed form that needs neither torch nor weights.

`tip-plan` (many runs, no torch) and the start-up check use it. `tip-exp --dry` counts activations on fake tensors
instead and takes the rest from here. Bytes over all GPUs, responses at full length, P parameters of w bytes each:

    process        Python and torch
    weights        P w of teacher and student
    gradients      P w of the student; AdamW twice that. With LoRA: of the float32 adapters only.
    activations    Per token and layer: w (4 I + 4 Q + T) + (2 w + 4) (2 H + [Q + K]), with MLP width I, query and
                   key widths Q and K over all heads, T tokens per sequence (the mask), hidden size H; [] only with
                   query and key norms. It is what autograd keeps for a Llama or Qwen with sdpa and float32 norms.
    hidden states  The teacher's at all response tokens of a step, and the student's with several micro-batches.
    logits         tile_mib (fused), or what autograd holds of all logits (materialized).

The KV cache of a sampling engine is not included.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tip_exp.config.schema import LoraConfig, RunConfig
from tip_exp.estimate.shapes import ModelShape, shape_of
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.units import GIB, MIB

if TYPE_CHECKING:
    import torch

BYTES = {"float32": 4, "bfloat16": 2}
PROCESS = "Python and torch"
PROCESS_GIB = 0.4  # resident after import, measured
# Keys that lower each part of `memory_gib`.
LOWERED_BY = {
    "teacher weights": "pair.teacher.dtype, pair.teacher.placement",
    "student weights": "pair.student.dtype",
    "gradients": "pair.student.dtype",
    "AdamW": "pair.student.dtype",
    "activations": "learner.micro_batch_tokens",
    "hidden states": "learner.prompts_per_step, learner.samples_per_prompt, data.max_response_tokens",
    "logits": "learner.tile_mib (learner.loss_backend=fused)",
    "sampling engine": "rollout.vllm.gpu_memory_utilization, rollout.vllm.sleep_level",
}
# Copies of the kept rows' logits that autograd holds at the peak of a divergence, measured; 5 for the others.
MATERIALIZED_COPIES = {"jsd": 9, "skew_reverse_kl": 9, "skew_forward_kl": 8}
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_MIN_SHARE = 0.05  # the message leaves out smaller parts


def memory_gib(config: RunConfig, activations: float | None = None) -> dict[str, float]:
    """GiB at the peak by purpose; their sum is the peak. A run with mode=eval holds weights only.

    `activations`: bytes, if they were counted; None: the closed form.
    """
    pair, learner = config.pair, config.learner
    teacher, student = (shape_of(model.path, model.revision) for model in (pair.teacher, pair.student))
    teacher_width, student_width = BYTES[pair.teacher.dtype], BYTES[pair.student.dtype]
    parts = {
        "teacher weights": teacher.parameters * teacher_width,
        "student weights": student.parameters * student_width,
    }
    if config.mode == "train":
        rollouts = learner.prompts_per_step * learner.samples_per_prompt
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        batch_tokens = min(learner.micro_batch_tokens, rollouts * longest)
        trained = parts["student weights"]
        if pair.student.lora is not None:
            trained = adapter_parameters(student, pair.student.lora) * BYTES["float32"]
            parts["student weights"] += trained
        parts["gradients"], parts["AdamW"] = trained, 2 * trained
        if activations is None:
            layer = layer_activation_bytes(student, student_width, 0 if learner.packing else longest)
            activations = batch_tokens * student.layers * layer
            if learner.activation_checkpointing:  # the input of every layer, and all of the one that is recomputed
                activations = batch_tokens * (student.layers * student.hidden * student_width + layer)
        parts["activations"] = activations
        several_batches = rollouts * longest > batch_tokens
        hidden = teacher.hidden * teacher_width + (student.hidden * student_width if several_batches else 0)
        parts["hidden states"] = rollouts * config.data.max_response_tokens * hidden
        parts["logits"] = learner.tile_mib * MIB
        if learner.loss_backend == "materialized":
            tokens = batch_tokens * config.data.max_response_tokens / longest
            parts["logits"] = materialized_bytes(config, teacher, student, tokens)
        if pair.teacher.placement == "offload" and config.device != "cpu":
            # The backbone is in host memory while these three are on the device: only the larger side counts.
            backbone = (teacher.parameters - teacher.vocab_size * teacher.hidden) * teacher_width
            parts["teacher weights"] -= min(backbone, sum(parts[n] for n in ("gradients", "activations", "logits")))
    return {PROCESS: PROCESS_GIB} | {name: size / GIB for name, size in parts.items()}


def materialized_bytes(config: RunConfig, teacher: ModelShape, student: ModelShape, tokens: float) -> float:
    """Peak of the materialized loss over `tokens` response tokens of one micro-batch, bytes.

    The largest of three moments, in float32 logits: the divergence, at kept tokens only; all logits beside the kept
    rows of both models; all gradients beside a second gradient of the head. A 16-bit weight is copied to float32.
    """
    logits = tokens * min(teacher.vocab_size, student.vocab_size)
    head = student.vocab_size * student.hidden
    learner, kept = config.learner, config.selector.retention * logits
    copies = MATERIALIZED_COPIES.get(learner.divergence, 5) if learner.estimator == "full" else 5
    second_gradient = head if config.pair.student.lora is None else 0
    numbers = max(copies * kept, logits + 2 * kept, logits + second_gradient)
    return 4 * (numbers + (head if config.pair.student.dtype != "float32" else 0))


def layer_activation_bytes(model: ModelShape, width: int, mask_length: int) -> float:
    """Bytes kept for the backward pass of one token in one layer.

    `width`: bytes per weight. `mask_length`: tokens per sequence, or 0 without a mask (packed rows).
    """
    normed = 2 * model.hidden + (model.query + model.key if model.qk_norm else 0)
    # Query, key, value and output; with a mask, sdpa repeats keys and values to the number of query heads.
    attention = 4 * model.query + mask_length if mask_length else 2 * model.query + 2 * model.key
    return width * (4 * model.intermediate + attention) + (2 * width + 4) * normed


def adapter_parameters(model: ModelShape, lora: LoraConfig) -> float:
    """rank x (inputs + outputs), summed over all linear layers that have an adapter."""
    hidden, query, key, intermediate = model.hidden, model.query, model.key, model.intermediate
    sides = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + intermediate)
    names = list(sides) if lora.target_modules == "all-linear" else lora.target_modules
    return model.layers * lora.rank * sum(sides.get(name, hidden + intermediate) for name in names)


def check_memory(config: RunConfig, device: torch.device, backend: str) -> None:
    """Raise ConfigError if `memory_gib` is above the free memory; names need, supply and the keys that lower it.

    A vLLM engine on CUDA that does not sleep while the learner works counts too. No check with ignore_memory=true, or
    where the system does not report free memory.
    """
    free = free_gib(device)
    if config.ignore_memory or free is None:
        return
    parts = {name: gib for name, gib in memory_gib(config).items() if name != PROCESS}  # already in use by now
    vllm = config.rollout.vllm
    if backend == "vllm" and device.type == "cuda" and vllm.sleep_level == 0:
        import torch

        total = torch.cuda.get_device_properties(device).total_memory / GIB
        parts["sampling engine"] = vllm.gpu_memory_utilization * total
    needed = sum(parts.values())
    if needed <= free:
        return
    large = {name: gib for name, gib in sorted(parts.items(), key=lambda part: -part[1]) if gib >= _MIN_SHARE * needed}
    keys = dict.fromkeys(key for name in large for key in LOWERED_BY[name].split(", "))
    raise ConfigError(
        f"this run needs about {needed:.1f} GiB ({', '.join(f'{name} {gib:.1f}' for name, gib in large.items())}), but "
        f"{device} has {free:.1f} GiB free. Lower it with {', '.join(keys)}, or a smaller pair; "
        "ignore_memory=true skips this check"
    )


def free_gib(device: torch.device) -> float | None:
    """Free memory of a CUDA device, else of the host; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / GIB
    return free_host_gib()


def free_host_gib() -> float | None:
    """Free memory of the machine or the cgroup, whichever is less; None if unknown."""
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free / GIB
