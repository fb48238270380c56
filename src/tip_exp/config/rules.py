"""Rules over several keys of a run, and paths that have to exist: every broken one is told, not the first alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tip_exp.config.schema import TOOL_TASKS, DatasetConfig, PrivilegedConfig, RunConfig, TravelConfig, WordSumsConfig
from tip_exp.selector.scores import UNBUDGETED, UNIT_INTERVAL, reads
from tip_exp.utils.paths import SHIPPED, resolve_model


def broken_rules(config: RunConfig) -> Iterator[str]:
    """Rules over several keys, and data files that have to exist."""
    selector, learner, evaluation = config.selector, config.learner, config.eval
    if selector.score in UNBUDGETED:
        if selector.retention != 1.0:
            what = "trains on every response token" if selector.score == "full" else "keeps every token of its quadrant"
            yield (
                f"selector.score={selector.score} {what}, but selector.retention is {selector.retention}; "
                "for a baseline of the same budget choose selector=random"
            )
        if selector.order != "positive":
            yield f"selector.score={selector.score} says yes or no: selector.order must be positive, not {selector.order}"
    elif selector.order == "positive":
        yield f"selector.order=positive keeps every positive score, so it needs a yes-or-no rule; {selector.score} is none"
    if selector.weight_by_score and (selector.order != "top" or selector.score in {*UNBUDGETED, "random"}):
        yield (
            f"selector.weight_by_score weighs kept tokens by their score, which means something for the top of a ranking; got "
            f"selector.score={selector.score}, selector.order={selector.order}"
        )
    if selector.score in UNIT_INTERVAL and selector.normalizer == "none":
        yield f"selector.score={selector.score} needs its statistics in [0, 1], but selector.normalizer is none"
    for statistic in sorted(set(selector.clip) - reads(selector.score)):
        yield f"selector.clip.{statistic} would do nothing: selector.score={selector.score} does not read {statistic}"
    if selector.order == "sample" and selector.normalizer == "rank":
        yield "selector.order=sample draws in proportion to the score; with normalizer=rank that is not the statistic"
    if selector.scope == "batch" and selector.normalize_over == "rollout" and selector.normalizer != "none":
        yield "selector.scope=batch compares rollouts, but selector.normalize_over=rollout normalises each alone"
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
        return
    if dataset.num_problems is None:
        yield f"{key}.num_problems: world={dataset.world} is generated, so it needs the number of tasks"
    if dataset.langs != ["en"]:
        yield f"{key}.langs: world={dataset.world} is written in en alone; got {', '.join(dataset.langs)}"
    if dataset.prompt == "official":
        yield f"{key}.prompt=official is read from data.root, so it needs world=official"


def missing_folder(key: str, path: str) -> Iterator[str]:
    """A path that is meant as a folder has to hold a model; hub ids ("org/name") are looked up when they load."""
    folder = Path(resolve_model(path)).expanduser()
    is_local = path.startswith((SHIPPED, "/", "./", "../", "~"))
    if is_local and not (folder / "config.json").is_file():
        yield f"{key}: no model in {folder} (it has no config.json)"
