"""Memory of a rank by phase of a run, from a config alone: a closed form that needs neither torch nor weights.

Phases follow one another, so the peak is their maximum and not a sum. With S shards (ranks / replicas), P parameters of
w bytes in the student and Q of v bytes in the teacher, V vocabulary parameters, c bytes of the compute dtype:

    load        weights: P w / S of the student, Q v / S of the teacher (on the host with placement=offload)
    rollout     weights, AdamW's moments 2 P w / S, the sampling engine awake: its share of the card
    teacher     … the engine asleep, two gathered layers, temporaries of a forward pass
    score       … the student's forward pass, then logit tiles
    backward    … gradients (P - V) w / S of the layers and 4 V of embedding and head, activations, the loss or the
                temporaries of the backward pass
    update      … gradients and moments; on the host a copy of weights and moments for the checkpoint
    evaluation  as rollout, at the lengths of eval; on the host the exported model, once a node

With several ranks, or where c differs from w, two layers are gathered at a time, and from score to backward the
vocabulary matrices are held whole. With rollout.staleness=1 all phases but load also hold what sampling needs, and a
whole copy of the student. With LoRA gradients and moments are those of the float32 adapters. On a CPU device
and host are one memory. tests/estimate compares the phases with torch's allocations on a CPU; nothing here has been
compared with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.estimate import activations
from tip_exp.estimate.activations import trained_lengths
from tip_exp.estimate.passes import Passes
from tip_exp.estimate.shapes import ModelShape, shape_of
from tip_exp.utils.units import GIB

PHASES = ("load", "rollout", "teacher", "score", "backward", "update", "evaluation")
PROCESS = "Python and torch"
PROCESS_GIB = 0.4  # resident after import, measured
CONTEXT_GIB = 0.5  # CUDA context with the workspaces of cuBLAS and NCCL: assumed
ASLEEP_GIB = 1.0  # what a sleeping vLLM engine keeps on its device, such as CUDA graphs: assumed
PINNED = 1.35  # pinned weights over their size: torch rounds a block up to a power of two (1.3 for Qwen3's layers)
CARD_SHARE = 0.95  # of a card that a plan may use; fragmentation takes the rest: assumed
EVALUATION_SHARE = 0.75  # of a card, at most, for the engine of an evaluation, a run without a learner
MAX_RANKS = 64
PROBLEMS = {"math500": 500, "aime24": 30, "aime25": 30, "gsm8k": 1319, "deepplanning": 48}  # of public test sets
CPU_PARAMETERS = 1e9  # of both models
ENGINE_WIDTH = 2  # vLLM computes in bfloat16 on CUDA


@dataclass(frozen=True, slots=True)
class Phase:
    """GiB of one rank by purpose: on its device, and on the host."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_gib(self) -> float:
        return sum(self.device.values())

    @property
    def host_gib(self) -> float:
        return sum(self.host.values())

    @property
    def gib(self) -> float:
        """Both, as on a CPU."""
        return self.device_gib + self.host_gib


def runs_on_cpu(config: RunConfig) -> bool:
    """Whether forecasts are for a CPU: device=cpu, or device=auto and a pair below CPU_PARAMETERS."""
    models = config.pair.teacher, config.pair.student
    parameters = sum(shape_of(model.path, model.revision).parameters for model in models)
    return config.device == "cpu" or (config.device == "auto" and parameters < CPU_PARAMETERS)


def total_ranks(config: RunConfig) -> int:
    """Ranks on all nodes; `ranks=auto` counts as one per node."""
    return config.nodes * (1 if config.ranks == "auto" else config.ranks)


class RankMemory(Passes):
    """What one rank of a run holds. `card_gib`: memory of its GPU; None: the run computes on a CPU."""

    def __init__(
        self,
        config: RunConfig,
        card_gib: float | None,
        ranks: int | None = None,
        *,
        backend: str = "auto",
        activation_bytes: float | None = None,
    ) -> None:
        """`ranks`: on all nodes; None: the config's. `backend`: of the rollouts; auto is vllm on a GPU.

        `activation_bytes`: of the fullest micro-batch without checkpointing, if they were counted on tensors.
        """
        on_gpu = card_gib is not None
        super().__init__(config, ranks or total_ranks(config), on_gpu=on_gpu, activation_bytes=activation_bytes)
        self.card_gib = card_gib
        default = "vllm" if on_gpu and not config.rollout.staleness else "hf"
        self.backend = next(name for name in (backend, config.rollout.backend, default) if name != "auto")

    def phases(self) -> dict[str, Phase]:
        """By name, in order; a run with mode=eval only loads and evaluates."""
        names = PHASES if self.config.mode == "train" else ("load", "evaluation")
        return {name: self._phase(name) for name in names}

    def peak(self) -> tuple[str, float]:
        """The phase with the most memory on the device (on a CPU: of the process), and its GiB."""
        sizes = {name: phase.device_gib if self.on_gpu else phase.gib for name, phase in self.phases().items()}
        name = max(sizes, key=sizes.__getitem__)
        return name, sizes[name]

    @property
    def host_peak_gib(self) -> float:
        """The most that a rank holds on the host."""
        return max(phase.host_gib for phase in self.phases().values())

    @property
    def sampled(self) -> ModelShape:
        """The model that writes responses."""
        return self.teacher if self.config.mode == "teacher" else self.student

    @property
    def engine_share(self) -> float:
        """The share of the card that a vLLM engine gets: rollout.vllm.gpu_memory_utilization.

        In an evaluation, which has no learner, it is what the weights leave, at most EVALUATION_SHARE and at least that
        key.
        """
        share = self.config.rollout.vllm.gpu_memory_utilization
        if self.config.mode == "train" or self.card_gib is None:
            return share
        resident = sum(self._resident("evaluation")[0].values()) / GIB + CONTEXT_GIB
        left = math.floor(100 * (CARD_SHARE - resident / self.card_gib)) / 100
        return max(share, min(EVALUATION_SHARE, left))

    def engine_gib(self) -> tuple[float, float]:
        """GiB that a vLLM engine gets on its card, and that it needs: weights, and the KV cache of one response."""
        assert self.card_gib is not None, "only an engine on a GPU has a share of it"
        data, evaluation = self.config.data, self.config.eval
        longest = data.max_prompt_tokens + max(data.max_response_tokens, evaluation.max_tokens)
        needed = ENGINE_WIDTH * (self.sampled.parameters + longest * self.sampled.cached) / GIB
        return self.engine_share * self.card_gib, needed

    @property
    def fits(self) -> bool:
        """Whether the peak fits CARD_SHARE of the card, and the engine its own share."""
        assert self.card_gib is not None, "a CPU has no card"
        given, needed = self.engine_gib()
        return self.peak()[1] <= CARD_SHARE * self.card_gib and (self.backend != "vllm" or needed <= given)

    def _phase(self, name: str) -> Phase:
        device, host = self._resident(name)
        if name != "load":
            self._add_engine(name, device, host)
        match name:
            case "teacher":
                device |= self.teacher_pass()
            case "score":
                device |= self.score_pass()
            case "backward":
                device |= self.backward_pass()
            case "update":
                # Gradients are freed before the size of the update is measured, one trained parameter at a time.
                full = self.config.pair.student.lora is None
                temporary = activations.UPDATE_RATIO_WIDTH * self.student.head if full else 0
                device |= {"gradients": max(self.trained, temporary) / self.shards} | self.whole_gradients()
                if self.on_gpu:
                    host["checkpoint"] = (self.student.parameters * self.student_width + 2 * self.trained) / self.shards
            case "evaluation" if self.config.mode == "train" and self.on_gpu:
                # The main rank holds the exported model whole; counted as a share of each rank of its node.
                weights = self.student.parameters * self.student_width
                host["exported model"] = weights * self.config.nodes / self.ranks
        if name in ("teacher", "score", "backward"):
            response = trained_lengths(self.config)[1]
            host["hidden states"] = self.rollouts * response * self.teacher.hidden * self.teacher_width
        context = {"CUDA context": CONTEXT_GIB} if self.on_gpu else {}
        return Phase(_in_gib(device) | context, {PROCESS: PROCESS_GIB} | _in_gib(host))

    def _resident(self, name: str) -> tuple[dict[str, float], dict[str, float]]:
        lora_bytes = self.trained if self.config.pair.student.lora is not None else 0
        weights = self.student.parameters * self.student_width + lora_bytes
        device: dict[str, float] = {}
        host: dict[str, float] = {}
        roles = self.config.loaded_models
        if "student" in roles:
            device["student weights"] = weights / self.shards
        if self.config.mode == "train" and name != "load":
            device["AdamW"] = 2 * self.trained / self.shards
        layers = self.teacher.layers * self.teacher.layer
        teacher = {"teacher vocabulary": self.teacher.vocabulary, "teacher layers": layers}
        for part, parameters in (teacher if "teacher" in roles else {}).items():
            alone = self.config.mode == "teacher" and self.ranks == 1  # evaluated from the device
            moved = self.offload and part == "teacher layers" and not alone
            size = parameters * self.teacher_width / self.shards
            (host if moved else device)[part] = PINNED * size if moved else size
        if name == "load" and self.on_gpu:
            host["weights being read"] = self._read_on_host(host.get("teacher layers", 0))
        return device, host

    def _read_on_host(self, pinned: float) -> float:
        """Bytes that pass through the host as models load; `pinned`: of the teacher's layers, once it is read.

        Files are mapped and taken as bfloat16, so that a matrix at a time is copied; a model that is loaded whole
        (models/load.py) as float32 is converted on the host first.
        """
        teacher, student = self.teacher.head * self.teacher_width, self.student.head * 4
        roles = self.config.loaded_models
        if "student" not in roles:
            student = 0
        elif self.student_width == 4 and (self.config.pair.student.lora is not None or not self.gathers):
            student = self.student.parameters * 4
        if self.teacher_width == 4 and self.ranks == 1:
            teacher = max(teacher, self.teacher.parameters * 4 - pinned)
        return max(teacher if "teacher" in roles else 0, student)

    def _add_engine(self, name: str, device: dict[str, float], host: dict[str, float]) -> None:
        awake, data, rollout = name in ("rollout", "evaluation"), self.config.data, self.config.rollout
        ahead = rollout.staleness > 0 and self.config.mode == "train"
        if self.backend == "vllm" and self.on_gpu:
            if rollout.vllm.sleep_level == 1 and self.config.mode == "train":  # torch keeps pinned memory
                host["sampling engine asleep"] = PINNED * self.sampled.parameters * ENGINE_WIDTH
            if awake or rollout.vllm.sleep_level == 0:
                device["sampling engine"] = max(self.engine_gib()) * GIB
            else:
                device["sampling engine asleep"] = ASLEEP_GIB * GIB
        elif awake or ahead:
            # A CPU engine of vLLM is counted like transformers.
            response = self.config.eval.max_tokens if name == "evaluation" else data.max_response_tokens
            evaluation = self.config.eval
            evaluated = num_problems(evaluation.model_dump()) * max(evaluation.samples, 1)
            responses = math.ceil(evaluated / self.ranks) if name == "evaluation" else self.rollouts
            rows = min(rollout.batch_size, responses)
            device |= activations.generation_bytes(self.sampled, rows, data.max_prompt_tokens, response, self.width)
            if ahead or self.gathers:
                device["sampler's weights" if ahead else "gathered student"] = self.student.parameters * self.width


def _in_gib(sizes: dict[str, float]) -> dict[str, float]:
    return {part: size / GIB for part, size in sizes.items()}


def num_problems(evaluation: dict[str, Any]) -> int:
    """Problems of all benchmarks of a config's `eval`."""
    datasets = evaluation["benchmarks"].values()
    return sum(dataset["num_problems"] or PROBLEMS.get(dataset["label"], 500) for dataset in datasets)


def ranks_needed(config: RunConfig, card_gib: float) -> int | None:
    """The config's ranks, doubled until the peak fits the card; None above MAX_RANKS."""
    ranks = total_ranks(config)
    while ranks <= MAX_RANKS:
        if RankMemory(config, card_gib, ranks).fits:
            return ranks
        ranks *= 2
    return None
