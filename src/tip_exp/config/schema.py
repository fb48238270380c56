"""What a run is, typed. `parsing` is where YAML becomes these objects, `rules` what holds between several keys.

The models hold no values: every number stands once, in conf/. No torch here: a wrong key answers in a second.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tip_exp.selector.scores import SCORES, STATISTICS


def _one_of(names: tuple[str, ...], what: str) -> AfterValidator:
    """A name from a list that grows with the code, so that it cannot be written as a Literal."""

    def check(value: str) -> str:
        if value not in names:
            close = difflib.get_close_matches(value, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"not a {what}; there are {', '.join(names)}{hint}")
        return value

    return AfterValidator(check)


def _file_name(value: str) -> str:
    if not value or value != Path(value).name or value.startswith("."):
        raise ValueError("becomes a folder's name, so it must be one path component without a leading dot")
    return value


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]  # a part that is not nothing
Fraction = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]
Grader = Literal["boxed_integer", "math", "strict"]
UpstreamBug = Literal[
    "flight_not_found",
    "hotel_city",
    "attraction_city",
    "route_order",
    "train_nesting",
    "empty_cells",
    "bad_json",
    "schema_dump",
    "restaurant_alias",
]  # keys of envs.deepplanning.tools.sandbox.UPSTREAM_BUGS
FileName = Annotated[str, AfterValidator(_file_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Strict):
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]


class TeacherConfig(ModelConfig):
    placement: Literal["resident", "offload"]


def _plain(value: list[str] | str) -> list[str] | str:
    if isinstance(value, str) and value != "all-linear":
        raise ValueError("a list of layer names, or all-linear (every linear layer but the head)")
    if not value:
        raise ValueError("names no layer; a list such as [q_proj, v_proj], or all-linear")
    return value


def _zero(value: float) -> float:
    if value != 0:
        raise ValueError("must be 0, for rollouts, scores and gradients have to see one and the same network")
    return value


class LoraConfig(_Strict):
    rank: Count
    alpha: Positive
    dropout: Annotated[float, AfterValidator(_zero)]
    target_modules: Annotated[list[str] | str, AfterValidator(_plain)]


class StudentConfig(ModelConfig):
    lora: LoraConfig | None


class ChatConfig(_Strict):
    system: str | None
    thinking: bool | None
    eval_thinking: bool | None
    thinking_may_differ: bool


class SourceConfig(_Strict):
    path: str
    revision: str | None


class PrivilegedConfig(_Strict):
    template: str
    max_tokens: Count


class PairConfig(_Strict):
    label: FileName
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    model: SourceConfig | None = None  # where teacher and student of a self pair are both from: written once
    chat: ChatConfig
    privileged: PrivilegedConfig | None
    teacher: TeacherConfig
    student: StudentConfig


class WordSumsConfig(_Strict):
    kind: Literal["word_sums"]
    label: FileName
    split: Split
    num_problems: Count
    seed: CountOrZero
    grader: Grader
    min_steps: Count
    max_steps: Count


class HubFileConfig(_Strict):
    repo: str
    revision: str
    file: str


class FieldsConfig(_Strict):
    """Dotted paths into a row: "reward_model.ground_truth", "prompt.0.content"."""

    id: str | None
    prompt: str
    answer: str
    solution: str | None


class PartConfig(_Strict):
    seed: CountOrZero
    start: Fraction
    stop: Share


class TableConfig(_Strict):
    kind: Literal["table"]
    label: FileName
    split: Split
    hub: HubFileConfig
    root: str | None
    root_file: str
    file: str | None
    fields: FieldsConfig
    answer_after: str | None
    strip: list[str]
    suffix: str
    part: PartConfig | None
    num_problems: Count | None
    grader: Grader


class TravelConfig(_Strict):
    kind: Literal["travel"]
    label: FileName
    split: Split
    world: Literal["official", "errands"]
    root: str | None
    langs: Annotated[list[Literal["en", "zh"]], Field(min_length=1)]
    num_problems: Count | None
    seed: CountOrZero
    prompt: Literal["none", "compact", "official"]
    show_schemas: bool
    corrected: list[UpstreamBug]
    official_join: bool


class CalculatorConfig(_Strict):
    kind: Literal["calculator"]
    label: FileName
    split: Split
    num_problems: Count
    seed: CountOrZero


class AgentConfig(_Strict):
    label: FileName
    thinking: bool
    max_turns: Count
    max_turn_tokens: Count | None
    max_calls_per_turn: Count | None
    surplus_calls: Literal["tell", "drop"]
    max_observation: Count | None
    observation_unit: Literal["tokens", "characters"]
    observation_cut: Literal["rows", "middle"]
    max_train_tokens: Count | None


TOOL_TASKS = (TravelConfig, CalculatorConfig)
DatasetConfig = Annotated[WordSumsConfig | TableConfig | TravelConfig | CalculatorConfig, Field(discriminator="kind")]


class DataConfig(_Strict):
    label: FileName
    root: str | None
    train: DatasetConfig
    max_prompt_tokens: Count
    max_response_tokens: Count


class LogprobMismatchConfig(_Strict):
    mean: Positive | None
    max: Positive | None


class VllmConfig(_Strict):
    separate_process: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    gpu_memory_utilization: Share
    tensor_parallel_size: Count
    max_num_seqs: Count
    max_model_len: Count | None
    kv_cache_memory_mib: Count | None
    enforce_eager: bool | None
    sleep_level: Literal[0, 1, 2]
    engine_args: dict[str, Any]


class RolloutConfig(_Strict):
    backend: Literal["auto", "hf", "vllm"]
    temperature: Positive
    top_p: Share
    top_k: CountOrZero
    batch_size: Count
    max_logprob_mismatch: LogprobMismatchConfig
    vllm: VllmConfig


class SelectorConfig(_Strict):
    label: FileName
    score: Annotated[str, _one_of(tuple(SCORES), "score rule")]
    normalizer: Literal["minmax", "quantile", "rank", "none"]
    normalize_over: Literal["batch", "micro_batch", "rollout"]
    clip: dict[Annotated[str, _one_of(STATISTICS, "statistic")], Share]
    order: Literal["top", "bottom", "sample", "positive"]
    sample_power: NonNegative
    rounding: Literal["floor", "ceil", "at_least_one"]
    scope: Literal["rollout", "batch"]
    retention: Share
    weight_by_score: bool


class TopKConfig(_Strict):
    k: Count
    support: Literal["student", "teacher"]
    rest: Literal["tail", "renormalize", "drop"]


class LearnerConfig(_Strict):
    num_steps: Count
    prompts_per_step: Count
    samples_per_prompt: Count
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]
    jsd_beta: Annotated[float, Field(gt=0, lt=1)]
    skew: Annotated[float, Field(gt=0, lt=1)]
    estimator: Literal["full", "topk", "sampled_k1"]
    topk: TopKConfig
    lr: Positive
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: CountOrZero
    final_lr_frac: Fraction
    weight_decay: NonNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    grad_clip: Positive
    loss_backend: Literal["fused", "materialized"]
    tile_mib: Count
    micro_batch_tokens: Count
    packing: bool
    activation_checkpointing: bool
    teacher_cache_mib: CountOrZero
    diagnostics_every: CountOrZero
    checkpoint_every: Count


class EvalConfig(_Strict):
    label: FileName
    every: CountOrZero
    teacher: bool
    greedy: bool
    samples: CountOrZero
    temperature: Positive
    top_p: Share
    top_k: CountOrZero
    max_tokens: Count
    seed: CountOrZero
    benchmarks: Annotated[dict[FileName, DatasetConfig], Field(min_length=1)]


class LoggerConfig(_Strict):
    wandb: Literal["off", "offline", "online"]
    project: FileName
    entity: str | None
    rollouts_per_sample: CountOrZero


class QuadrantConfig(_Strict):
    entropy: NonNegative
    divergence: NonNegative


class RunConfig(_Strict):
    name: FileName
    mode: Literal["train", "eval"]
    sweep: FileName | None
    seed: CountOrZero
    device: Literal["auto", "cpu", "cuda"]
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
