"""Rules on what a run finds or leaves on a machine: model folders, processors, arguments of vLLM, secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.utils.paths import HUB_ID, LOCAL, SHIPPED, is_file, resolve_model

MAX_PROCESSORS = 1024  # threads, processes or machines

# Arguments of vllm.LLM that `engine_args` cannot override: why.
RESERVED = {
    "trust_remote_code": "a model's own code is never run; choose a model whose architecture transformers has",
    "model": "the student is sampled; set pair.student.path",
    "tokenizer": "prompts are sent as token ids; set pair.student.path",
    "load_format": "the engine gets the learner's weights; remove it",
    "skip_tokenizer_init": "prompts are sent as token ids; remove it",
    "worker_extension_cls": "the engine gets the learner's weights through it; remove it",
    "logprobs_mode": "the learner compares raw log-probabilities; remove it",
    "gpu_memory_utilization": "forecasts need it; set rollout.vllm.gpu_memory_utilization",
    "max_model_len": "prompts are checked against it; set rollout.vllm.max_model_len",
    "dtype": "log-probabilities are compared by it; set rollout.vllm.dtype",
    "max_num_seqs": "forecasts need it; set rollout.batch_size",
    "enable_sleep_mode": "the learner needs the engine's memory; set rollout.vllm.sleep_level",
    "hf_token": "a run writes its configuration to config.yaml; set the environment variable HF_TOKEN",
}
_SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)$", re.IGNORECASE)
_MIN_SECRET = 8  # shorter values are words
# Keys of a model's config that limit its positions; the first that is set counts.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# Folder -> how the pairs of conf/pair/ that lie in it are made.
MADE_BY = {
    "outputs/students": "`make students` makes those of the seeds 0, 1 and 2",
    "outputs/tiny_ledger": "`make ledger` makes it",
    "models/smollm2": "`python -m scripts.make_pairs smollm2 --out models/smollm2` makes it",
}
NO_TEMPLATE = (
    "pair.student.path: the tokenizer of {} has no chat template; set pair.chat.template to a Jinja file, such as that "
    "of docs/own_models.md for base models"
)


def machine_rules(config: RunConfig) -> Iterator[str]:
    """One message for each rule that the configuration breaks."""
    for key in ("ranks", "nodes", "num_threads"):
        if isinstance(value := getattr(config, key), int) and value > MAX_PROCESSORS:
            yield f"{key} must be at most {MAX_PROCESSORS}; got {value}"
    replicas = config.learner.replicas
    if isinstance(config.ranks, int) and config.ranks * config.nodes % replicas:
        yield (
            f"learner.replicas={replicas} does not divide ranks x nodes = {config.ranks * config.nodes}; choose a "
            "divisor, 1 to shard over all ranks"
        )
    yield from _vllm_rules(config.rollout.vllm.engine_args)
    yield from _secret_rules(config)


def missing_models(config: RunConfig) -> Iterator[str]:
    """A local path must hold a model, or a chat template; hub ids ("org/name") are checked when they load."""
    template = config.pair.chat.template
    if template is not None and not is_file(template):
        yield f"pair.chat.template: there is no file {template}; set it to a Jinja template, or to null"
    for role, model in (("teacher", config.pair.teacher), ("student", config.pair.student)):
        key, folder = f"pair.{role}.path", Path(resolve_model(model.path))
        if model.path.startswith(LOCAL):
            if not is_file(f"{folder}/config.json"):
                remedy = MADE_BY.get(f"{folder.parent}", "choose a folder of a model, or a hub id")
                yield f"{key}: no model in {folder} (it has no config.json); {remedy}"
            elif model.revision is not None:
                yield f"pair.{role}.revision={model.revision} has no effect: {key} is a folder; set it to null"
        elif not HUB_ID.fullmatch(model.path) and not is_file(f"{folder}/config.json"):
            yield not_a_model(key, model.path)
    if template is None and _has_no_template(config.pair.student.path):
        yield NO_TEMPLATE.format(config.pair.student.path)


def not_a_model(key: str, path: str) -> str:
    return f"{key} must be a folder with a config.json, a hub id (org/name) or {SHIPPED}NAME; got {path!r}"


def _has_no_template(path: str) -> bool:
    """Whether a tokenizer in a folder has no chat template, by its files; False where they cannot tell."""
    try:
        folder = Path(resolve_model(path)).expanduser()
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return not (values.get("chat_template") or any((folder / name).exists() for name in TEMPLATE_FILES))
    except (OSError, RuntimeError, ValueError, AttributeError):  # what is wrong with it is said when it loads
        return False


def too_few_positions(config: RunConfig) -> Iterator[str]:
    """The lengths that a local model cannot hold, whatever the prompts; hub ids and prompts are checked in the run."""
    limits = {role: limit for role in ("teacher", "student") if (limit := _positions(getattr(config.pair, role).path))}
    model = {
        role: f"pair.{role}.path={getattr(config.pair, role).path} has {n} positions" for role, n in limits.items()
    }
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    least = min(limits, key=limits.__getitem__, default=None)
    if config.mode == "train" and least is not None and prompt + response > limits[least]:
        yield (
            f"data.max_prompt_tokens ({prompt}) + data.max_response_tokens ({response}) = {prompt + response}, but "
            f"{model[least]}; lower one of them"
        )
    readers = {role: limit for role, limit in limits.items() if reads_evaluation(config, role)}
    least = min(readers, key=readers.__getitem__, default=None)
    if least is not None and (longest := config.eval.max_tokens) >= readers[least]:
        yield f"eval.max_tokens ({longest}) leaves no place for a prompt: {model[least]}; lower it"


def reads_evaluation(config: RunConfig, role: str) -> bool:
    """Whether "teacher" or "student" reads evaluation prompts and responses in this run or in one that it starts."""
    return role == "student" or config.eval.needs_teacher


def _positions(path: str) -> int | None:
    """The most positions of a model in a folder; None for a hub id, or without such a key."""
    try:
        values = json.loads((Path(resolve_model(path)).expanduser() / "config.json").read_text(encoding="utf-8"))
        values = values.get("text_config") or values
        return next((values[key] for key in POSITION_KEYS if isinstance(values.get(key), int)), None)
    except (OSError, RuntimeError, ValueError, AttributeError):  # what is wrong with it is said when it loads
        return None


def missing_packages(config: RunConfig) -> Iterator[str]:
    """The package of `logger.tracker`, which is an extra of the same name, and vLLM, if it must sample."""
    if config.rollout.backend == "vllm" and find_spec("vllm") is None:
        yield (
            "rollout.backend=vllm: vLLM is not installed; pip install 'tip_exp[vllm]' for CUDA (docs/running.md says "
            "how for a CPU), or choose rollout=auto"
        )
    name = config.logger.tracker
    if name is not None and find_spec(name) is None:
        yield (
            f"logger.tracker={name}: the package {name} is not installed; pip install 'tip_exp[{name}]', or choose "
            "logger=files"
        )


def _vllm_rules(engine_args: Mapping[str, Any]) -> Iterator[str]:
    """`rollout.vllm.engine_args` must leave the arguments of RESERVED as they are."""
    for name in engine_args:
        if (reason := RESERVED.get(name.lstrip("-").replace("-", "_"))) is not None:
            yield f"rollout.vllm.engine_args.{name} cannot be set: {reason}"


def _secret_rules(config: RunConfig) -> Iterator[str]:
    """No value may contain that of an environment variable named like a secret; the message does not show it."""
    secrets = {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET and not value.isalpha()
    }
    if secrets:
        yield from _with_secret(config.model_dump(), "", secrets)


def _with_secret(value: Any, key: str, secrets: dict[str, str]) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _with_secret(inner, f"{key}.{name}" if key else str(name), secrets)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _with_secret(inner, f"{key}[{number}]", secrets)
    elif isinstance(value, str) and (name := next((n for n, secret in secrets.items() if secret in value), None)):
        yield f"{key} holds the value of the environment variable {name}, and a run writes it to config.yaml; remove it"
