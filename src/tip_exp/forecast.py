"""What a run will take, before it starts: memory from its sizes, time from finished runs of the same shape.

The memory model (bytes; P parameters, w bytes of a weight): Python and torch themselves + teacher P w + student
P (w + w gradient + 2 w AdamW) + activations of one micro-batch + logits, summed over all GPUs. Activations are 34 bytes
a token, layer and hidden unit at 16 bits (Korthikanti et al. 2022, Eq. 2, without attention's matrices). Logits are
`tile_mib` (fused), or two rows of vocabulary, value and gradient, for each kept token of the micro-batch
(materialized). A sampling engine's cache is not in it. Sizes are read from the model's folder, or guessed from its
name ("…-8B").

Time is measured, not modelled, wherever a run of the same shape (all but seed, selector and name) is finished; else it
is scaled, by floating-point operations, from finished runs of the same pair; else it is a lower bound for one H200.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tip_exp.config import ModelConfig, RunConfig, deciding_values
from tip_exp.paths import resolve_model
from tip_exp.runs import RunRecord
from tip_exp.summary import flatten

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
ACTIVATION = 17  # numbers a token, layer and hidden unit
H200_FLOPS = 0.4 * 989e12  # 40 % of its dense bfloat16 peak
PROCESS_GIB = 0.4  # resident after import, measured
MEAN_LENGTH = 0.5  # of max_response_tokens, for evaluations and rollouts alike
VOCABULARY = 152_000  # where the model's config is not at hand; Qwen's


@dataclass(frozen=True, slots=True)
class Forecast:
    """GiB of the learner's process and seconds of the run, with where the seconds come from."""

    gib: float
    seconds: float
    basis: str  # measured | scaled | lower bound on one H200


@dataclass(frozen=True, slots=True)
class ModelSize:
    parameters: float
    hidden: float
    layers: float
    vocabulary: int


class Forecaster:
    """Knows the finished runs, and answers for runs that are not."""

    def __init__(self, finished: list[RunRecord]) -> None:
        self._by_shape: dict[str, list[RunRecord]] = {}
        self._by_pair: dict[str, list[RunRecord]] = {}
        for record in finished:
            if record.result is not None and "reused_from" not in record.result:
                self._by_shape.setdefault(_shape(flatten(record.config)), []).append(record)
                self._by_pair.setdefault(record.config["pair"]["label"], []).append(record)

    def __call__(self, config: RunConfig) -> Forecast:
        gib = learner_gib(config)
        if alike := self._by_shape.get(_shape(deciding_values(config))):
            own = [record for record in alike if record.config["selector"] == config.selector.model_dump()] or alike
            peaks = [_peak_gib(record) for record in own]
            return Forecast(median(peaks), median(_seconds(record) for record in own), "measured")
        if same_pair := self._by_pair.get(config.pair.label):
            rate = median(_flops_of(record) / _seconds(record) for record in same_pair)
            return Forecast(gib, flops(config) / rate, "scaled")
        return Forecast(gib, flops(config) / H200_FLOPS, "lower bound on one H200")


def learner_gib(config: RunConfig) -> float:
    """Peak of the learner's process by the model at the head of this file."""
    teacher, student = model_size(config.pair.teacher), model_size(config.pair.student)
    learner, width = config.learner, BYTES[config.pair.student.dtype]
    states = teacher.parameters * BYTES[config.pair.teacher.dtype] + 4 * student.parameters * width
    tokens = learner.micro_batch_tokens
    held = learner.prompts_per_step * learner.samples_per_prompt
    tokens = min(tokens, held * (config.data.max_prompt_tokens + config.data.max_response_tokens))
    activations = tokens * student.layers * student.hidden * ACTIVATION * width
    if learner.loss_backend == "fused":
        logits = learner.tile_mib * 2.0**20
    else:
        logits = 2 * 4 * tokens * config.selector.retention * student.vocabulary
    return PROCESS_GIB + (states + activations + logits) / GIB


def flops(config: RunConfig) -> float:
    """Floating-point operations of a whole run: 2 P a token forward, 4 P backward; sampling counts as a forward."""
    return _flops(
        model_size(config.pair.teacher).parameters,
        model_size(config.pair.student).parameters,
        config.model_dump(),
    )


def model_size(model: ModelConfig) -> ModelSize:
    """From config.json and the weights' files if the model is a folder, else from "…-8B" in its name."""
    folder = Path(resolve_model(model.path)).expanduser()
    if (folder / "config.json").is_file():
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        width = BYTES.get(shape.get("dtype") or shape.get("torch_dtype"), 4)
        return ModelSize(stored / width, shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"])
    named = re.findall(r"(\d+(?:\.\d+)?)B", model.path)
    parameters = float(named[-1]) * 1e9 if named else 1e9
    hidden = (100 * parameters / 12) ** (1 / 3)  # P = 12 L h^2 with layers about a hundred units wide each
    return ModelSize(parameters, hidden, hidden / 100, VOCABULARY)


def _flops(teacher: float, student: float, config: dict) -> float:
    learner, evaluation = config["learner"], config["eval"]
    length = config["data"]["max_prompt_tokens"] + MEAN_LENGTH * config["data"]["max_response_tokens"]
    rollouts = learner["num_steps"] * learner["prompts_per_step"] * learner["samples_per_prompt"]
    training = rollouts * length * (2 * teacher + (2 + 6) * student)
    times = 1 + (learner["num_steps"] // evaluation["every"] if evaluation["every"] else 1)
    problems = sum(benchmark["num_problems"] or 500 for benchmark in evaluation["benchmarks"].values())
    asked = problems * (evaluation["samples"] + evaluation["greedy"]) * MEAN_LENGTH * evaluation["max_tokens"]
    return training + asked * 2 * (times * student + evaluation["teacher"] * teacher)


def _flops_of(record: RunRecord) -> float:
    pair = record.config["pair"]
    models = [{key: pair[role][key] for key in ModelConfig.model_fields} for role in ("teacher", "student")]
    sizes = [model_size(ModelConfig(**model)).parameters for model in models]
    return _flops(sizes[0], sizes[1], record.config)


def _seconds(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["totals"]["wall_s"]


def _peak_gib(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["memory"]["memory/process_peak_gib"]


def _shape(flat: dict) -> str:
    """What decides time and memory but for the selector: a seed, a name, a quadrant's cut does not."""
    skipped = ("selector.", "seed", "name", "sweep", "logger.", "quadrants.")
    kept = {key: value for key, value in flat.items() if not key.startswith(skipped) and value is not None}
    return json.dumps(kept, sort_keys=True)
