"""Rules that involve several keys, and files that must exist. All broken rules are reported together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tip_exp.config.datasets import TOOL_TASKS, TableConfig, TravelConfig
from tip_exp.config.machine_rules import machine_rules
from tip_exp.config.presets import selector_options, selector_preset, shadow_errors
from tip_exp.config.schema import RunConfig
from tip_exp.config.selector_rules import selector_rules
from tip_exp.selector.lookup import trial_error
from tip_exp.selector.scores import SCORES
from tip_exp.utils.io import file_digest
from tip_exp.utils.paths import is_file, is_folder

TABLE_FILES = (".jsonl", ".parquet", ".csv")


def broken_rules(config: RunConfig) -> Iterator[str]:
    """One message for each rule that the configuration breaks: key, value and remedy."""
    if config.mode == "train":
        yield from _selector_rules(config)
        yield from _shadow_rules(config)
        yield from _learner_rules(config)
        yield from _staleness_rules(config)
        yield from _length_rules(config)
    yield from _common_rules(config)
    yield from _dataset_rules(config)
    yield from _privileged_rules(config)
    yield from machine_rules(config)
    if config.pair.student.per_seed and str(config.seed) not in config.pair.student.path:
        yield (
            f"pair.student.per_seed=true needs a path that contains ${{seed}}; got {config.pair.student.path} for seed "
            f"{config.seed}"
        )


def _selector_rules(config: RunConfig) -> Iterator[str]:
    """`selector_rules`, and what a rule of the user's own raises on random tokens."""
    selector, label = config.selector, config.selector.label
    problems = list(selector_rules(selector))
    yield from problems
    if selector.score in SCORES and label in selector_options():
        preset = selector_preset(label)["score"]
        if preset != selector.score:
            yield (
                f"selector.label={label} would name the runs of selector.score={selector.score} after the rule "
                f"{preset}; choose selector={selector.score} if there is such an option, or another selector.label"
            )
    if not problems and (error := trial_error(config.selector.rule_settings(), config.quadrants.model_dump())):
        yield f"selector.score: tried on random tokens, {error}"


def _shadow_rules(config: RunConfig) -> Iterator[str]:
    yield from shadow_errors(config.selector)
    if config.selector.shadows and not config.learner.diagnostics_every:
        yield (
            "selector.shadows are scored at the steps with diagnostics, and learner.diagnostics_every=0 has none; set "
            "it to 1 or more, or selector.shadows=[]"
        )


def _learner_rules(config: RunConfig) -> Iterator[str]:
    learner, divergence = config.learner, config.learner.divergence
    if learner.warmup_steps >= learner.num_steps and learner.warmup_steps:
        yield (
            f"learner.warmup_steps ({learner.warmup_steps}) must be below learner.num_steps ({learner.num_steps}); "
            "for a short run set learner.warmup_steps=0"
        )
    if learner.gradient_every and learner.prompts_per_step < 2:
        yield (
            f"learner.gradient_every={learner.gradient_every} measures signal to noise between the prompts of a step, "
            f"so it needs learner.prompts_per_step of at least 2; got {learner.prompts_per_step}"
        )
    if learner.estimator == "topk" and learner.topk.rest == "drop" and divergence != "forward_kl":
        yield (
            f"learner.topk.rest=drop with learner.divergence={divergence}: the sum over the top-k tokens is "
            "unbounded below, as the student can move its mass elsewhere; choose rest=tail, renormalize, or forward_kl"
        )
    if learner.estimator == "topk" and learner.topk.rest == "renormalize" and learner.topk.k == 1:
        yield (
            "learner.topk.rest=renormalize with learner.topk.k=1: the one token has probability 1 in both models, so "
            "the loss is 0; choose learner.topk.k of at least 2, or rest=tail"
        )
    if learner.estimator == "sampled_k1":
        if divergence != "reverse_kl":
            yield (
                f"learner.estimator=sampled_k1 with learner.divergence={divergence}: tokens sampled by the student "
                "estimate reverse_kl only; choose learner.divergence=reverse_kl"
            )
        for key, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            value = getattr(config.rollout, key)
            if value != neutral:
                yield (
                    f"learner.estimator=sampled_k1 with rollout.{key}={value}: tokens would not follow the student's "
                    f"distribution and the gradient would be biased; it needs rollout.{key}={neutral:g}"
                )


def _staleness_rules(config: RunConfig) -> Iterator[str]:
    if not config.rollout.staleness:
        return
    key = f"rollout.staleness={config.rollout.staleness}"
    if config.rollout.backend == "vllm":
        yield (
            f"{key} with rollout.backend=vllm: the engine sleeps while the learner works on the same device, so it "
            "cannot sample then; choose rollout.backend=hf or rollout.staleness=0"
        )
    if isinstance(config.data.train, TOOL_TASKS):
        yield (
            f"{key} with tool tasks: the environments would run in the learner's process at the same time, which has "
            "not been tried; choose rollout.staleness=0"
        )
    if config.learner.gradient_every:
        yield (
            f"{key} with learner.gradient_every={config.learner.gradient_every}: the influence needs another attention "
            "kernel, which the sampling thread would use as well; set learner.gradient_every=0 or rollout.staleness=0"
        )
    if config.learner.estimator == "sampled_k1":
        yield (
            f"{key} with learner.estimator=sampled_k1: tokens would not follow the present student's distribution and "
            "the gradient would be biased; choose rollout.staleness=0, or learner.estimator=full or topk"
        )


def _length_rules(config: RunConfig) -> Iterator[str]:
    data, agent, selector = config.data, config.agent, config.selector
    limit = config.rollout.vllm.max_model_len
    sampled_tokens = trained_tokens = data.max_prompt_tokens + data.max_response_tokens
    if limit is not None and limit < sampled_tokens:
        yield (
            f"rollout.vllm.max_model_len ({limit}) is below data.max_prompt_tokens + data.max_response_tokens "
            f"= {sampled_tokens}; null takes what the run needs"
        )
    floors = selector.scope == "rollout" and selector.rounding == "floor" and selector.order != "positive"
    if floors and selector.retention * data.max_response_tokens < 1 - 1e-9:
        yield (
            f"selector.retention={selector.retention:g} with selector.rounding=floor keeps no token of a response "
            f"of data.max_response_tokens ({data.max_response_tokens}); choose selector.rounding=at_least_one, or a "
            "larger selector.retention"
        )
    if agent is not None and agent.max_train_tokens is not None:
        trained_tokens = min(sampled_tokens, agent.max_train_tokens)
        if agent.max_train_tokens <= data.max_prompt_tokens:
            yield (
                f"agent.max_train_tokens ({agent.max_train_tokens}) leaves no response token after a prompt of "
                f"data.max_prompt_tokens ({data.max_prompt_tokens}); choose a larger agent.max_train_tokens, or null"
            )
    if config.learner.micro_batch_tokens < trained_tokens:
        yield (
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) cannot hold one rollout of "
            f"data.max_prompt_tokens + data.max_response_tokens = {trained_tokens} (at most agent.max_train_tokens)"
        )


def _common_rules(config: RunConfig) -> Iterator[str]:
    """Rules on what every mode reads."""
    evaluation, limit = config.eval, config.rollout.vllm.max_model_len
    if not evaluation.greedy and evaluation.samples == 0:
        yield "eval.greedy=false and eval.samples=0 evaluate nothing; set eval.greedy=true or eval.samples above 0"
    if limit is not None and limit <= evaluation.max_tokens:
        yield (
            f"rollout.vllm.max_model_len ({limit}) leaves no prompt before eval.max_tokens ({evaluation.max_tokens}); "
            "null takes what the run needs"
        )
    if config.learner.packing and config.pair.attention == "eager":
        yield (
            "learner.packing=true with pair.attention=eager: eager attention would attend across packed sequences; "
            "choose pair.attention=sdpa or flash_attention_2, or learner.packing=false"
        )


def _dataset_rules(config: RunConfig) -> Iterator[str]:
    datasets = {f"eval.benchmarks.{name}": dataset for name, dataset in config.eval.benchmarks.items()}
    for key, dataset in datasets.items():
        if dataset.num_problems == 1:
            yield f"{key}.num_problems: a standard error needs at least 2 problems; got 1"
        if dataset.split == "train":
            yield f"{key}.split is train: the run would be evaluated on training problems; choose test or validation"
    if config.mode == "train":
        datasets["data.train"] = config.data.train
        if (split := config.data.train.split) != "train":
            yield f"data.train.split must be train, so that no evaluation problem is trained on; got {split}"
    for key, dataset in datasets.items():
        if isinstance(dataset, TravelConfig):
            yield from _travel_rules(key, dataset)
        elif isinstance(dataset, TableConfig):
            yield from _table_rules(key, dataset)
        if isinstance(dataset, TOOL_TASKS) and config.agent is None:
            yield f"{key} is a tool task, so it needs limits: choose agent=default, official or base_code"
    all_datasets = [config.data.train, *config.eval.benchmarks.values()]
    if config.agent is not None and not any(isinstance(dataset, TOOL_TASKS) for dataset in all_datasets):
        yield "agent has no effect: no data set of this run has tools; choose agent=none"
    agent = config.agent
    if agent is not None and (agent.observation_cut, agent.observation_unit) == ("middle", "tokens"):
        yield "agent.observation_cut=middle counts characters: set agent.observation_unit=characters, or choose rows"


def _table_rules(key: str, dataset: TableConfig) -> Iterator[str]:
    if dataset.part is not None and dataset.part[0] >= dataset.part[1]:
        yield f"{key}.part={dataset.part} must be [start, stop] with start below stop"
    if dataset.hub is None and dataset.file is None:
        file = "eval.file" if key == "eval.benchmarks.jsonl" else f"{key}.file"
        hub = "" if dataset.fields.prompt == "auto" else f", or {key}.hub"
        yield f"{key} names no data: set {file} to a .jsonl, .parquet or .csv file{hub}"
    if dataset.file is not None and not is_file(dataset.file):
        yield f"{key}.file: there is no file {dataset.file}; set it to a {', '.join(TABLE_FILES)} file"
    elif dataset.file is not None and Path(dataset.file).suffix.lower() not in TABLE_FILES:
        yield f"{key}.file must be a {', '.join(TABLE_FILES)} file; got {dataset.file}"
    elif dataset.file is not None and dataset.sha256 != file_digest(Path(dataset.file).expanduser()):
        yield f"{key}.sha256={dataset.sha256}: {dataset.file} has another SHA-256; restore it, or set the key to null"
    elif dataset.file is None and dataset.sha256 is not None:
        yield f"{key}.sha256 has no effect: {key}.file is null, and a file of the hub is fixed by its revision"


def _travel_rules(key: str, dataset: TravelConfig) -> Iterator[str]:
    if dataset.world == "official":
        if dataset.root is None or not is_folder(dataset.root):
            yield f"{key}: data.root must be the folder of the official queries and databases; got {dataset.root}"
        if dataset.split == "validation":
            yield f"{key}.split must be train or test: the official tasks have no validation split; got validation"
        return
    if dataset.num_problems is None:
        yield f"{key}.num_problems must be a number: the tasks of world={dataset.world} are generated"
    if dataset.langs != ["en"]:
        yield f"{key}.langs must be [en]: world={dataset.world} is in English; got {', '.join(dataset.langs)}"
    if dataset.prompt == "official":
        yield f"{key}.prompt=official is read from data.root, so it needs world=official; choose none or compact"


def _privileged_rules(config: RunConfig) -> Iterator[str]:
    if (privileged := config.pair.privileged) is None:
        return
    key, template = "pair.privileged", privileged.template
    if "{prompt}" not in template or not ("{solution}" in template or "{answer}" in template):
        yield f"{key}.template needs {{prompt}}, and {{solution}} or {{answer}}; got {template!r}"
    if config.mode != "train":
        return
    if isinstance(config.data.train, TOOL_TASKS):
        yield f"{key}: tool tasks have no solution text; choose another data set or pair.privileged=null"
    train = config.data.train
    has_no_solution = isinstance(train, TableConfig) and train.answer_after is None and train.fields.solution is None
    if "{solution}" in template and has_no_solution:
        yield f"{key}.template needs {{solution}}, but data.train.fields.solution is null; set it, or use {{answer}}"
    teacher_tokens = privileged.max_tokens + config.data.max_response_tokens
    if config.learner.micro_batch_tokens < teacher_tokens:
        yield (
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) cannot hold the teacher's input of "
            f"{key}.max_tokens + data.max_response_tokens = {teacher_tokens}"
        )
