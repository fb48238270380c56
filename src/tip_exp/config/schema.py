"""The typed form of a run's configuration. Values are in conf/.

Only a key that the config.yaml of older runs lacks has a default here.

`parse` turns YAML into these classes; `rules` checks what involves several keys. Importing this module loads no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from tip_exp.config.datasets import DatasetConfig, Strict
from tip_exp.config.names import FileName, Layers, PositiveOrQuantile, Rule, Statistic
from tip_exp.config.numbers import (
    Count,
    CountOrZero,
    Fraction,
    InsideUnit,
    NonNegative,
    Positive,
    Ranks,
    Share,
    Temperature,
)
from tip_exp.selector.scores import Group, Normalizer, Order, Rounding, Scope, Weight


class ModelConfig(Strict):
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]


class TeacherConfig(ModelConfig):
    placement: Literal["resident", "offload"]


class LoraConfig(Strict):
    rank: Count
    alpha: Positive
    target_modules: Layers


class StudentConfig(ModelConfig):
    per_seed: bool
    lora: LoraConfig | None


class ChatConfig(Strict):
    template: str | None
    system: str | None
    thinking: bool | None
    eval_thinking: bool | None


class PrivilegedConfig(Strict):
    template: str
    max_tokens: Count


class PairConfig(Strict):
    label: FileName
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    chat: ChatConfig
    stop: Literal["union", "class", "refuse"]
    privileged: PrivilegedConfig | None
    teacher: TeacherConfig
    student: StudentConfig


class DataConfig(Strict):
    label: FileName
    root: str | None
    train: DatasetConfig
    max_prompt_tokens: Count
    max_response_tokens: Count


class AgentConfig(Strict):
    max_turns: Count
    max_calls_per_turn: Count | None
    surplus_calls: Literal["tell", "drop"]
    max_observation: Count | None
    observation_unit: Literal["tokens", "characters"]
    observation_cut: Literal["rows", "middle"]
    max_train_tokens: Count | None


class VllmConfig(Strict):
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    gpu_memory_utilization: Share
    max_model_len: Count | None
    sleep_level: Literal[0, 1, 2]
    engine_args: dict[str, JsonValue]


class RolloutConfig(Strict):
    backend: Literal["auto", "hf", "vllm"]
    temperature: Temperature
    top_p: Share
    top_k: CountOrZero
    batch_size: Count
    staleness: Literal[0, 1]
    max_logprob_mismatch: dict[Literal["mean", "p999", "max"], Positive | None]
    vllm: VllmConfig


class SelectorConfig(Strict):
    label: FileName
    score: Rule
    normalizer: Normalizer
    normalize_over: Group
    clip: dict[Statistic, Share]
    order: Order
    rounding: Rounding
    scope: Scope
    retention: Share
    weight: Weight
    weight_offset: PositiveOrQuantile | None
    parameters: dict[str, float]
    normalizer_of: dict[Statistic, Normalizer]
    shadows: list[str]

    def rule_settings(self) -> dict[str, Any]:
        """The arguments of a `Selector`, without the thresholds of the quadrants."""
        return self.model_dump(exclude={"label", "shadows"})


class TopKConfig(Strict):
    k: Count
    support: Literal["student", "teacher"]
    rest: Literal["tail", "renormalize", "drop"]


class LearnerConfig(Strict):
    num_steps: Count
    prompts_per_step: Count
    samples_per_prompt: Count
    divergence: Literal[
        "reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", "tv", "sqrt_kl", "clipped_kl"
    ]
    jsd_beta: InsideUnit
    skew: InsideUnit
    kl_clip: PositiveOrQuantile
    average: Literal["rollout", "token"]
    estimator: Literal["full", "topk", "sampled_k1"]
    topk: TopKConfig
    lr: Positive
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: CountOrZero
    final_lr_frac: Fraction
    eps: Positive
    weight_decay: NonNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    grad_clip: Positive
    non_finite: Literal["stop", "skip"]
    loss_backend: Literal["fused", "materialized"]
    tile_mib: Count
    micro_batch_tokens: Count
    packing: bool
    compute_dtype: Literal["float32", "bfloat16"]
    replicas: Count
    activation_checkpointing: bool
    diagnostics_every: CountOrZero
    gradient_every: CountOrZero
    checkpoint_every: Count


class EvalConfig(Strict):
    label: FileName
    every: CountOrZero
    teacher: bool
    greedy: bool
    samples: CountOrZero
    sequence_kl: bool
    temperature: Temperature
    top_p: Share
    top_k: CountOrZero
    max_tokens: Count
    seed: CountOrZero
    benchmarks: Annotated[dict[FileName, DatasetConfig], Field(min_length=1)]

    @property
    def measures_kl(self) -> bool:
        """Whether `sequence_kl` has responses to measure: it needs sampled ones."""
        return self.sequence_kl and self.samples > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is evaluated, or compared with the student."""
        return self.teacher or self.measures_kl


class LoggerConfig(Strict):
    wandb: Literal["off", "offline", "online"]
    tracker: Literal["trackio", "tensorboard", "mlflow"] | None = None  # runs from before this key have none
    project: FileName
    rollouts_per_eval: CountOrZero


class QuadrantConfig(Strict):
    entropy: NonNegative
    divergence: NonNegative


class RunConfig(Strict):
    name: FileName
    mode: Literal["train", "eval", "teacher"]
    sweep: FileName | None
    seed: CountOrZero
    device: Literal["auto", "cpu", "cuda"]
    ranks: Ranks
    nodes: Count
    ignore_memory: bool
    num_threads: Count | None
    quadrants: QuadrantConfig
    pair: PairConfig
    data: DataConfig
    agent: AgentConfig | None
    rollout: RolloutConfig
    selector: SelectorConfig
    learner: LearnerConfig
    eval: EvalConfig
    logger: LoggerConfig

    @property
    def loaded_models(self) -> tuple[Literal["teacher", "student"], ...]:
        """The models whose weights the run needs; an evaluation may need no teacher."""
        if self.mode == "teacher":
            return ("teacher",)
        return ("teacher", "student") if self.mode == "train" or self.eval.needs_teacher else ("student",)

    def untracked(self) -> RunConfig:
        """The same without W&B and without another tracker."""
        return self.model_copy(update={"logger": self.logger.model_copy(update={"wandb": "off", "tracker": None})})
