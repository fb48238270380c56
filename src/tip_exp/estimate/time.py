"""What a run will take, before it starts: memory from its sizes, time from finished runs of the same shape.

The memory model (bytes; P parameters, w bytes of a weight), summed over all GPUs, responses at their longest:
    Python and torch themselves, teacher P w, student P (w + w gradient + 2 w AdamW; of LoRA, in float32,
    the adapters alone have the last three),
    activations of a micro-batch: a token and layer w (4 I + 4 Q + T) + (2 w + 4) (2 H + [Q + K]), for MLP width I,
    widths Q and K of queries and keys, sequences of T tokens (the mask), hidden size H; [] where Q and K are normed.
    It is what torch keeps for the backward pass of a Llama or Qwen with sdpa, counted; norms compute in float32,
    hidden states of all response tokens of a step: the teacher's, and the student's if it has several micro-batches,
    logits: `tile_mib` (fused), or two rows of vocabulary, value and gradient, a kept token (materialized).
A sampling engine's cache is not in it.

Time is measured, not modelled, wherever a run of the same shape (all but seed, selector and name) is finished; else it
is scaled, by floating-point operations, from finished runs of the same pair; else it is a lower bound for one H200.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tip_exp.config.parse import deciding_values, flatten
from tip_exp.config.schema import LoraConfig, RunConfig
from tip_exp.estimate.shapes import ModelShape, shape_of
from tip_exp.records.reader import RunRecord, read_runs
from tip_exp.utils.units import GIB

BYTES = {"float32": 4, "bfloat16": 2}
H200_FLOPS = 0.4 * 989e12  # 40 % of its dense bfloat16 peak
PROCESS = "Python and torch"
PROCESS_GIB = 0.4  # resident after import, measured
MEAN_LENGTH = 0.5  # of max_response_tokens, for evaluations and rollouts alike


@dataclass(frozen=True, slots=True)
class Forecast:
    """GiB of the learner's process and seconds of the run, with where the seconds come from."""

    gib: float
    seconds: float
    basis: str  # measured | scaled | lower bound on one H200


class Forecaster:
    """Knows the finished runs, and answers for runs that are not."""

    def __init__(self, finished: list[RunRecord]) -> None:
        self._by_shape: dict[str, list[RunRecord]] = {}
        self._by_pair: dict[str, list[RunRecord]] = {}
        for record in finished:
            if record.result is not None and "reused_from" not in record.result:
                self._by_shape.setdefault(_shape(flatten(record.config)), []).append(record)
                self._by_pair.setdefault(record.config["pair"]["label"], []).append(record)

    @classmethod
    def from_outputs(cls, outputs: Path) -> Forecaster:
        """A forecaster that has read the finished runs below `outputs`."""
        return cls([record for record in read_runs([outputs]) if record.is_done] if outputs.is_dir() else [])

    def __call__(self, config: RunConfig) -> Forecast:
        gib = learner_gib(config)
        if alike := self._by_shape.get(_shape(deciding_values(config))):
            own = [record for record in alike if record.config["selector"] == config.selector.model_dump()] or alike
            peaks = [_peak_gib(record) for record in own]
            return Forecast(median(peaks), median(_seconds(record) for record in own), "measured")
        if same_pair := self._by_pair.get(config.pair.label):
            rate = median(_flops_of(record.config) / _seconds(record) for record in same_pair)
            return Forecast(gib, flops(config) / rate, "scaled")
        return Forecast(gib, flops(config) / H200_FLOPS, "lower bound on one H200")


def learner_gib(config: RunConfig) -> float:
    """Peak of the learner's process by the model at the head of this file."""
    return sum(memory(config).values())


def memory(config: RunConfig) -> dict[str, float]:
    """GiB of the learner's process at its peak, by what they are for; an evaluation holds weights alone."""
    pair, learner = config.pair, config.learner
    teacher, student = (shape_of(model.path, model.revision) for model in (pair.teacher, pair.student))
    theirs, ours = BYTES[pair.teacher.dtype], BYTES[pair.student.dtype]
    parts = {"teacher weights": teacher.parameters * theirs, "student weights": student.parameters * ours}
    if config.mode == "train":
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        rollouts = learner.prompts_per_step * learner.samples_per_prompt
        tokens = min(learner.micro_batch_tokens, rollouts * longest)
        responses = rollouts * config.data.max_response_tokens
        trained = student.parameters * ours
        if pair.student.lora is not None:
            trained = adapter_parameters(student, pair.student.lora) * BYTES["float32"]
        parts["gradients"], parts["AdamW"] = trained, 2 * trained
        if pair.student.lora is not None:
            parts["student weights"] += trained
        # of a packed row there is no mask; of a checkpointed layer the input is kept, and one layer lives at a time
        a_layer = activation_bytes(student, ours, 0 if learner.packing else longest)
        kept = student.layers * student.hidden * ours + a_layer
        parts["activations"] = tokens * (kept if learner.activation_checkpointing else student.layers * a_layer)
        hidden = teacher.hidden * theirs + (student.hidden * ours if rollouts * longest > tokens else 0)
        parts["hidden states"] = responses * hidden
        if learner.loss_backend == "fused":
            parts["logits"] = learner.tile_mib * 2.0**20
        else:
            parts["logits"] = 2 * 4 * tokens * config.selector.retention * student.vocabulary
        parts["teacher weights"] -= _not_beside(config, parts, teacher.parameters - teacher.vocabulary * teacher.hidden)
    return {PROCESS: PROCESS_GIB} | {name: size / GIB for name, size in parts.items()}


def _not_beside(config: RunConfig, parts: dict[str, float], backbone: float) -> float:
    """Bytes of the teacher's `backbone` (parameters) that leave before other parts take their place (placement.py)."""
    placement, on_cpu = config.pair.teacher.placement, config.device == "cpu"  # auto: where one needs to ask, a GPU
    if placement == "resident" or (placement == "offload" and on_cpu):
        return 0.0
    later = ["gradients", "activations", "logits"]
    if placement == "two_phase" and not on_cpu:
        later += ["student weights", "AdamW"]
    return min(backbone * BYTES[config.pair.teacher.dtype], sum(parts[name] for name in later))


def adapter_parameters(model: ModelShape, lora: LoraConfig) -> float:
    """Of all layers: rank x (inputs + outputs) of every linear layer that has an adapter."""
    hidden, query, key, inner = model.hidden, model.query, model.key, model.intermediate
    sides = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    names = list(sides) if lora.target_modules == "all-linear" else lora.target_modules
    return model.layers * lora.rank * sum(sides.get(name, hidden + inner) for name in names)


def activation_bytes(model: ModelShape, width: int, length: int) -> float:
    """Kept for the backward pass of one token in one layer; `width` bytes a weight, sequences of `length` tokens, or 0
    where no mask is kept."""
    normed = 2 * model.hidden + (model.query + model.key if model.qk_norm else 0)
    # Query, key, value, output; sdpa repeats keys and values to the query's heads where it is given a mask.
    attention = 4 * model.query + length if length else 2 * model.query + 2 * model.key
    return width * (4 * model.intermediate + attention) + (2 * width + 4) * normed


def flops(config: RunConfig) -> float:
    """Floating-point operations of a whole run: 2 P a token forward, 4 P backward; sampling counts as a forward."""
    return _flops_of(config.model_dump())


def _flops_of(config: dict) -> float:
    learner, evaluation, pair = config["learner"], config["eval"], config["pair"]
    teacher, student = (
        shape_of(pair[role]["path"], pair[role]["revision"]).parameters for role in ("teacher", "student")
    )
    length = config["data"]["max_prompt_tokens"] + MEAN_LENGTH * config["data"]["max_response_tokens"]
    rollouts = learner["num_steps"] * learner["prompts_per_step"] * learner["samples_per_prompt"]
    training = rollouts * length * (2 * teacher + (2 + 6) * student)
    times = 1 + (learner["num_steps"] // evaluation["every"] if evaluation["every"] else 1)
    problems = sum(benchmark["num_problems"] or 500 for benchmark in evaluation["benchmarks"].values())
    asked = problems * (evaluation["samples"] + evaluation["greedy"]) * MEAN_LENGTH * evaluation["max_tokens"]
    return training + asked * 2 * (times * student + evaluation["teacher"] * teacher)


def _seconds(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["totals"]["wall_s"]


def _peak_gib(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["memory"]["memory/process_peak_gib"]


def _shape(flat: dict) -> str:
    """What decides time and memory but for the selector: a seed, a name, a quadrant's cut does not."""
    skipped = ("selector.", "seed", "name", "sweep", "logger.", "quadrants.", "ignore_memory")
    kept = {key: value for key, value in flat.items() if not key.startswith(skipped) and value is not None}
    return json.dumps(kept, sort_keys=True)
