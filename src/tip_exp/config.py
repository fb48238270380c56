"""What a run is, typed; `parse` is where YAML becomes objects, and where every broken rule is told at once.

The models hold no values: every number stands once, in conf/. No torch here: a wrong key answers in a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tip_exp.deepplanning.tools import UPSTREAM_BUGS
from tip_exp.grading import GRADERS
from tip_exp.paths import SHIPPED, conf_dir, resolve_model
from tip_exp.scores import SCORES, STATISTICS, UNBUDGETED, UNIT_INTERVAL, reads


class ConfigError(ValueError):
    """A run that cannot start as it is configured; the message names key, value and remedy."""


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
Grader = Annotated[str, _one_of(GRADERS, "grader")]
FileName = Annotated[str, AfterValidator(_file_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Strict):
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]


class TeacherConfig(ModelConfig):
    placement: Literal["resident", "offload", "two_phase"]


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
    world: Literal["official", "trips", "errands"]
    root: str | None
    split_file: str | None
    langs: Annotated[list[Literal["en", "zh"]], Field(min_length=1)]
    num_problems: Count | None
    seed: CountOrZero
    prompt: Literal["none", "compact", "official"]
    show_schemas: bool
    corrected: list[Annotated[str, _one_of(tuple(UPSTREAM_BUGS), "bug of the official tools")]]
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


class GapConfig(_Strict):
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
    max_logprob_gap: GapConfig
    vllm: VllmConfig


class SelectorConfig(_Strict):
    label: FileName
    score: Annotated[str, _one_of(tuple(SCORES), "score rule")]
    normalizer: Literal["minmax", "quantile", "rank", "none"]
    population: Literal["batch", "micro_batch", "rollout"]
    clip: dict[Annotated[str, _one_of(STATISTICS, "statistic")], Share]
    order: Literal["top", "bottom", "sample", "all"]
    sample_power: NonNegative
    rounding: Literal["floor", "ceil", "at_least_one"]
    scope: Literal["rollout", "batch"]
    retention: Share
    soft: bool


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


def register_resolvers() -> None:
    """`${percent:0.5}` -> 50: ratios have one spelling in names (1, 1.0 and 1.00 are all r100)."""

    def percent(ratio: Any) -> str:
        return f"{100 * ratio:g}" if isinstance(ratio, int | float) else str(ratio)  # parse() tells what is wrong

    OmegaConf.register_new_resolver("percent", percent, replace=True)


def parse(raw: DictConfig, *, with_weights: bool = True) -> RunConfig:
    """Turn a composed config into a typed one, or raise one ConfigError that lists everything wrong with it.

    `with_weights`: local models have to be there; a dry run does without.
    """
    try:
        values = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise _config_error([str(error).splitlines()[0]]) from error
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _config_error([_told(detail) for detail in error.errors()]) from None
    problems = list(_broken_rules(config))
    if with_weights:
        for role in ("teacher", "student"):
            problems += _missing_folder(f"pair.{role}.path", getattr(config.pair, role).path)
    if problems:
        raise _config_error(problems)
    return config


def load(path: Path) -> RunConfig:
    """Read the config.yaml that a run wrote."""
    raw = OmegaConf.load(path)
    assert isinstance(raw, DictConfig)
    return parse(raw)


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """Everything that decides a run's numbers, flat: where it logs and what it is called do not."""
    return flatten(config.model_dump(exclude={"name", "sweep", "logger", "ignore_memory"}))


def digest(config: RunConfig) -> str:
    """12 hex digits of `deciding_values`."""
    return hashlib.sha256(json.dumps(deciding_values(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """What decides the numbers and differs: ["learner.lr: 1e-06 -> 2e-06"]."""
    old, new = deciding_values(before), deciding_values(after)
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"learner": {"lr": 1}} -> {"learner.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _config_error(problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"this configuration cannot run: {problems[0]}")
    return ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _told(detail: Any) -> str:
    """One pydantic error as: key, what is allowed, what came."""
    path = _without_kind([str(part) for part in detail["loc"] if part != "[key]"])
    key, message = ".".join(path), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "extra_forbidden":
        siblings = _fields_at(path[:-1])
        close = difflib.get_close_matches(path[-1], siblings, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"there are {', '.join(siblings)}"
        return f"{key} is not a key; {hint}"
    return f"{key}: {message[0].lower()}{message[1:]}; got {detail['input']!r}"


def _without_kind(path: list[str]) -> list[str]:
    """pydantic puts a data set's kind into the path of an error: data.train.word_sums.seed is data.train.seed."""
    if path[:2] == ["data", "train"]:
        return path[:2] + path[3:]
    return path[:3] + path[4:] if path[:2] == ["eval", "benchmarks"] else path


def _fields_at(path: list[str]) -> list[str]:
    """Names of the keys beside a wrong one."""
    if path[:2] in (["data", "train"], ["eval", "benchmarks"]):
        kinds = (WordSumsConfig, TableConfig, *TOOL_TASKS)
        return sorted({field for kind in kinds for field in kind.model_fields})
    if path == ["agent"]:
        return list(AgentConfig.model_fields)
    model: Any = RunConfig
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _broken_rules(config: RunConfig) -> Iterator[str]:
    """Rules over several keys, and data files that have to exist."""
    selector, learner, evaluation = config.selector, config.learner, config.eval
    if selector.score in UNBUDGETED:
        if selector.retention != 1.0:
            what = "trains on every response token" if selector.score == "full" else "keeps every token of its quadrant"
            yield (
                f"selector.score={selector.score} {what}, but selector.retention is {selector.retention}; "
                "for a baseline of the same budget choose selector=random"
            )
        if selector.order != "all":
            yield f"selector.score={selector.score} says yes or no: selector.order must be all, not {selector.order}"
    elif selector.order == "all":
        yield f"selector.order=all keeps every positive score, so it needs a yes-or-no rule; {selector.score} is none"
    if selector.soft and (selector.order != "top" or selector.score in {*UNBUDGETED, "random"}):
        yield (
            f"selector.soft weighs kept tokens by their score, which means something for the top of a ranking; got "
            f"selector.score={selector.score}, selector.order={selector.order}"
        )
    if selector.score in UNIT_INTERVAL and selector.normalizer == "none":
        yield f"selector.score={selector.score} needs its statistics in [0, 1], but selector.normalizer is none"
    for statistic in sorted(set(selector.clip) - reads(selector.score)):
        yield f"selector.clip.{statistic} would do nothing: selector.score={selector.score} does not read {statistic}"
    if selector.order == "sample" and selector.normalizer == "rank":
        yield "selector.order=sample draws in proportion to the score; with normalizer=rank that is not the statistic"
    if selector.scope == "batch" and selector.population == "rollout" and selector.normalizer != "none":
        yield "selector.scope=batch compares rollouts, but selector.population=rollout normalises each alone"
    yield from _broken_estimator(config)
    if learner.packing and config.pair.attention == "eager":
        yield "learner.packing=true with pair.attention=eager: eager attention would mix sequences; choose sdpa"
    if learner.warmup_steps >= learner.num_steps and learner.warmup_steps:
        yield f"learner.warmup_steps ({learner.warmup_steps}) must be below learner.num_steps ({learner.num_steps})"
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    if config.agent is not None and config.agent.max_train_tokens is not None:
        if config.agent.max_train_tokens <= config.data.max_prompt_tokens:
            yield (
                f"agent.max_train_tokens ({config.agent.max_train_tokens}) leaves nothing to train on behind a prompt "
                f"of data.max_prompt_tokens ({config.data.max_prompt_tokens})"
            )
        longest = min(longest, config.agent.max_train_tokens)
    if config.pair.privileged is not None:
        yield from _broken_privileged(config, config.pair.privileged)
    if learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens ({learner.micro_batch_tokens}) cannot hold one rollout of "
            f"data.max_prompt_tokens + data.max_response_tokens = {longest}"
        )
    if learner.packing and config.pair.attention == "eager":
        yield "learner.packing=true needs pair.attention=sdpa or flash_attention_2, not eager"
    if (given := config.rollout.vllm.max_model_len) is not None and given < longest:
        yield (
            f"rollout.vllm.max_model_len ({given}) is below data.max_prompt_tokens + data.max_response_tokens "
            f"= {longest}; null takes what the run needs"
        )
    if not evaluation.greedy and evaluation.samples == 0:
        yield "eval.greedy=false and eval.samples=0 evaluate nothing; set one of them"
    datasets = {"data.train": config.data.train}
    datasets |= {f"eval.benchmarks.{name}": dataset for name, dataset in evaluation.benchmarks.items()}
    for key, dataset in datasets.items():
        yield from _broken_dataset(key, dataset)
        if isinstance(dataset, TOOL_TASKS) and config.agent is None:
            yield f"{key} is a tool task, so it needs limits: choose agent=default, official or base_code"
    if config.agent is not None and not any(isinstance(dataset, TOOL_TASKS) for dataset in datasets.values()):
        yield f"agent={config.agent.label} would do nothing: no data set of this run has tools; choose agent=none"
    if (split := config.data.train.split) != "train":
        yield f"data.train.split must be train, so that nothing is trained on what is evaluated; got {split}"
    for name, dataset in evaluation.benchmarks.items():
        if dataset.num_problems == 1:
            yield f"eval.benchmarks.{name}.num_problems: a standard error takes at least 2 problems; got 1"
        if dataset.split == "train":
            yield f"eval.benchmarks.{name}.split is train: the run would be evaluated on what it trains on"
    chat = config.pair.chat
    if chat.thinking != chat.eval_thinking and not chat.thinking_may_differ:
        yield (
            f"pair.chat.thinking is {chat.thinking}, but pair.chat.eval_thinking is {chat.eval_thinking}: the student "
            "would be evaluated in another mode than it is trained in (pair.chat.thinking_may_differ=true allows it)"
        )


def _broken_privileged(config: RunConfig, privileged: PrivilegedConfig) -> Iterator[str]:
    key, template = "pair.privileged", privileged.template
    if "{prompt}" not in template or not ("{solution}" in template or "{answer}" in template):
        yield f"{key}.template needs {{prompt}}, and {{solution}} or {{answer}}; got {template!r}"
    if isinstance(config.data.train, TOOL_TASKS):
        yield f"{key}: tool tasks have no solution to read; choose another data set or pair.privileged=null"
    longest = privileged.max_tokens + config.data.max_response_tokens
    if config.learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) cannot hold what the teacher reads: "
            f"{key}.max_tokens + data.max_response_tokens = {longest}"
        )


def _broken_estimator(config: RunConfig) -> Iterator[str]:
    learner, rollout = config.learner, config.rollout
    if learner.estimator == "topk" and learner.topk.rest == "drop" and learner.divergence != "forward_kl":
        yield (
            f"learner.topk.rest=drop with learner.divergence={learner.divergence}: a sum over the top-k tokens alone "
            "falls without bound by moving the student's mass out of them; choose rest=tail, renormalize, or forward_kl"
        )
    if learner.estimator != "sampled_k1":
        return
    if learner.divergence != "reverse_kl":
        yield (
            f"learner.estimator=sampled_k1 with learner.divergence={learner.divergence}: tokens that the student "
            "samples estimate reverse_kl alone"
        )
    for key, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        if (value := getattr(rollout, key)) != neutral:
            yield (
                f"learner.estimator=sampled_k1 with rollout.{key}={value}: its tokens would not be the student's own "
                f"distribution's, and the gradient biased; it needs rollout.{key}={neutral:g}"
            )


def _broken_dataset(key: str, dataset: DatasetConfig) -> Iterator[str]:
    if isinstance(dataset, TravelConfig):
        yield from _broken_travel(key, dataset)
    if isinstance(dataset, TOOL_TASKS):
        return
    if isinstance(dataset, WordSumsConfig):
        if dataset.min_steps > dataset.max_steps:
            yield f"{key}.min_steps ({dataset.min_steps}) is above max_steps ({dataset.max_steps})"
        return
    if dataset.part is not None and dataset.part.start >= dataset.part.stop:
        yield f"{key}.part is empty: start {dataset.part.start} is not below stop {dataset.part.stop}"
    if dataset.file is not None and not Path(dataset.file).expanduser().is_file():
        yield f"{key}.file: there is no file {dataset.file}"
    elif dataset.file is None and dataset.root is not None:
        path = Path(dataset.root).expanduser() / dataset.root_file
        if not path.is_file():
            yield f"{key}: data.root is {dataset.root}, but there is no {path}"


def _broken_travel(key: str, dataset: TravelConfig) -> Iterator[str]:
    if dataset.world == "official":
        if dataset.root is None or not Path(dataset.root).expanduser().is_dir():
            yield f"{key}: the official queries and databases are read from data.root, a folder; got {dataset.root}"
        if dataset.split_file is None or not (conf_dir() / dataset.split_file).is_file():
            yield f"{key}.split_file: a file of ids in {conf_dir()}; got {dataset.split_file}"
        return
    if dataset.num_problems is None:
        yield f"{key}.num_problems: world={dataset.world} is generated, so it needs the number of tasks"
    if dataset.langs != ["en"]:
        yield f"{key}.langs: world={dataset.world} is written in en alone; got {', '.join(dataset.langs)}"
    if dataset.prompt == "official":
        yield f"{key}.prompt=official is read from data.root, so it needs world=official"


def _missing_folder(key: str, path: str) -> Iterator[str]:
    """A path that is meant as a folder has to hold a model; hub ids ("org/name") are looked up when they load."""
    folder = Path(resolve_model(path)).expanduser()
    is_local = path.startswith((SHIPPED, "/", "./", "../", "~"))
    if is_local and not (folder / "config.json").is_file():
        yield f"{key}: no model in {folder} (it has no config.json)"
