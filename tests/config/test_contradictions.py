"""Keys that are fine alone and contradict each other: every pair is refused, and the message names the keys."""

# ruff: noqa: E501 (tables)
from __future__ import annotations

import copy
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tip_exp.config.machine_rules import RESERVED
from tip_exp.config.parse import accept
from tip_exp.selector.lookup import rule_inputs
from tip_exp.selector.scores import (
    NORMALIZED,
    SCORES,
    SIGNED,
    UNBUDGETED,
    UNIT_INTERVAL,
)
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir

RANKED = sorted(SCORES.keys() - UNBUDGETED)
SCORE, ORDER, RETENTION = "selector.score", "selector.order", "selector.retention"
PLAIN = {"selector.clip": {}, "selector.normalizer": "none"}
ARGS, EVAL, TRAIN = "rollout.vllm.engine_args", "eval.benchmarks.word_sums", "data.train"
TABLE = {
    "kind": "table", "label": "t", "split": "train", "hub": "a/b@c:d.jsonl", "file": None, "answer_after": None, "strip": [],
    "fields": {"id": None, "prompt": "p", "answer": "a", "solution": None}, "suffix": "", "part": None,
    "num_problems": None, "grader": "math",
}  # fmt: skip
CALCULATOR = {"kind": "calculator", "label": "c", "split": "train", "num_problems": 9}
OFFICIAL = {
    "kind": "travel", "label": "deepplanning", "world": "official", "root": ".", "langs": ["en"], "num_problems": None,
    "prompt": "compact", "show_schemas": True, "corrected": [], "official_join": False,
}  # fmt: skip
LIMITS = {
    "max_turns": 3, "max_calls_per_turn": None, "surplus_calls": "tell", "max_observation": None,
    "observation_unit": "tokens", "observation_cut": "rows", "max_train_tokens": None,
}  # fmt: skip
TEMPLATE = {"template": "{prompt} {solution}", "max_tokens": 90}
SHORT = {"learner.micro_batch_tokens": 100}

# (overrides, keys that the message must name)
CASES: list[tuple[dict[str, Any], list[str]]] = [
    *(({**PLAIN, SCORE: s, ORDER: "positive", RETENTION: r}, [SCORE, RETENTION]) for s in sorted(UNBUDGETED) for r in (0.1, 0.5, 0.99)),
    *(({**PLAIN, SCORE: s, ORDER: o, RETENTION: 1.0}, [SCORE, ORDER]) for s in sorted(UNBUDGETED) for o in ("top", "bottom", "sample")),
    *(({SCORE: s, "selector.clip": {}, ORDER: "positive"}, [ORDER]) for s in RANKED),
    *(
        ({SCORE: s, "selector.clip": {}, ORDER: o, "selector.weight": "score"}, ["selector.weight", ORDER])
        for s in RANKED for o in ("bottom", "sample")
    ),
    *(
        ({**PLAIN, SCORE: s, ORDER: "positive", RETENTION: 1.0, "selector.weight": "score"}, ["selector.weight", SCORE])
        for s in sorted(UNBUDGETED)
    ),
    ({SCORE: "random", "selector.clip": {}, "selector.weight": "score"}, ["selector.weight", SCORE]),
    *(({SCORE: s, **PLAIN}, [SCORE, "selector.normalizer"]) for s in sorted(UNIT_INTERVAL)),
    *(
        ({SCORE: s, "selector.clip": {name: 0.98}, ORDER: "positive" if s in UNBUDGETED else "top", RETENTION: 1.0}, [f"selector.clip.{name}", SCORE])
        for s in sorted(SCORES) for name in NORMALIZED if name not in rule_inputs(SCORES[s])
    ),
    *(({SCORE: s, "selector.clip": {}, ORDER: "sample", "selector.normalizer": "rank"}, [ORDER, "selector.normalizer"]) for s in RANKED if set(rule_inputs(SCORES[s])) & set(NORMALIZED)),
    ({SCORE: "entropy", "selector.clip": {}, ORDER: "sample", "selector.normalizer_of": {"entropy": "rank"}}, [ORDER, "selector.normalizer_of"]),
    *(({**PLAIN, SCORE: s, ORDER: "sample"}, [ORDER, SCORE]) for s in sorted(SIGNED)),
    ({"selector.scope": "batch", "selector.normalize_over": "rollout", "selector.normalizer": "none", "selector.normalizer_of": {"entropy": "minmax", "reverse_kl": "minmax"}}, ["selector.scope", "selector.normalize_over"]),
    *(
        ({"selector.scope": "batch", "selector.normalize_over": group, "selector.normalizer": n}, ["selector.scope", "selector.normalize_over"])
        for group in ("rollout", "micro_batch") for n in ("minmax", "quantile", "rank")
    ),
    ({"selector.scope": "micro_batch", "selector.normalize_over": "rollout"}, ["selector.scope", "selector.normalize_over"]),
    *(({RETENTION: r}, [RETENTION, "selector.rounding", "data.max_response_tokens"]) for r in (1e-30, 1e-3, 0.0138)),
    *(
        ({"learner.estimator": "sampled_k1", "learner.divergence": d}, ["learner.estimator", "learner.divergence"])
        for d in ("forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")
    ),
    *(
        ({"learner.estimator": "sampled_k1", f"rollout.{key}": value}, ["learner.estimator", f"rollout.{key}"])
        for key, value in (("temperature", 0.7), ("temperature", 1.5), ("top_p", 0.9), ("top_k", 20))
    ),
    *(
        ({"learner.estimator": "topk", "learner.topk.rest": "drop", "learner.divergence": d}, ["learner.topk.rest", "learner.divergence"])
        for d in ("reverse_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")
    ),
    ({"learner.estimator": "topk", "learner.topk.rest": "renormalize", "learner.topk.k": 1}, ["learner.topk.rest", "learner.topk.k"]),
    ({"rollout.staleness": 1, "rollout.backend": "hf", "learner.gradient_every": 1}, ["rollout.staleness", "learner.gradient_every"]),
    ({"learner.packing": True, "pair.attention": "eager"}, ["learner.packing", "pair.attention"]),
    *(({"learner.warmup_steps": n, "learner.num_steps": 5}, ["learner.warmup_steps", "learner.num_steps"]) for n in (5, 6, 100)),
    (SHORT, ["learner.micro_batch_tokens", "data.max_prompt_tokens", "data.max_response_tokens"]),
    (SHORT | {"data.max_response_tokens": 90, "pair.privileged": TEMPLATE}, ["learner.micro_batch_tokens", "pair.privileged.max_tokens"]),
    ({"rollout.vllm.max_model_len": 50}, ["rollout.vllm.max_model_len", "data.max_prompt_tokens"]),
    ({"rollout.vllm.max_model_len": 150, "eval.max_tokens": 150}, ["rollout.vllm.max_model_len", "eval.max_tokens"]),
    ({"eval.greedy": False, "eval.samples": 0}, ["eval.greedy", "eval.samples"]),
    *(({"ranks": r, "nodes": n, "learner.replicas": k}, ["learner.replicas", "ranks", "nodes"]) for r, n, k in ((2, 1, 3), (3, 2, 4), (1, 1, 2))),
    *(({key: 1025}, [key]) for key in ("ranks", "nodes", "num_threads")),
    *(({f"{EVAL}.split": "train"}, [f"{EVAL}.split"]) for _ in (0,)),
    *(({f"{TRAIN}.split": split}, [f"{TRAIN}.split"]) for split in ("test", "validation")),
    ({f"{EVAL}.num_problems": 1}, [f"{EVAL}.num_problems"]),
    ({"pair.student.per_seed": True}, ["pair.student.per_seed", "seed"]),
    ({"pair.teacher.revision": "abc"}, ["pair.teacher.revision", "pair.teacher.path"]),
    ({"pair.student.revision": "abc"}, ["pair.student.revision", "pair.student.path"]),
    *(({f"pair.{role}.path": path}, [f"pair.{role}.path"]) for role in ("teacher", "student") for path in ("", "a b/c", "a/b/c", "x")),
    ({"agent": LIMITS}, ["agent"]),
    ({TRAIN: CALCULATOR}, [TRAIN, "agent"]),
    ({TRAIN: CALCULATOR, "agent": LIMITS | {"observation_cut": "middle"}}, ["agent.observation_cut", "agent.observation_unit"]),
    ({EVAL: OFFICIAL | {"split": "validation"}, "agent": LIMITS}, [f"{EVAL}.split", "validation"]),
    ({TRAIN: TABLE | {"hub": None}}, [f"{TRAIN}.file", f"{TRAIN}.hub"]),
    ({TRAIN: TABLE | {"file": "nowhere.jsonl"}}, [f"{TRAIN}.file"]),
    ({TRAIN: TABLE | {"file": __file__}}, [f"{TRAIN}.file"]),
    ({TRAIN: TABLE | {"part": [0.5, 0.5]}}, [f"{TRAIN}.part"]),
    ({TRAIN: TABLE, "pair.privileged": TEMPLATE}, ["pair.privileged.template", f"{TRAIN}.fields.solution"]),
    *(({"pair.privileged": TEMPLATE | {"template": t}}, ["pair.privileged.template"]) for t in ("", "{prompt}", "{answer}", "{solution} x")),
    *(({ARGS: {name: True}}, [f"{ARGS}.{name}"]) for name in RESERVED),
    *(({ARGS: {key: 1}}, [f"{ARGS}.{key}", f"set rollout.vllm.{key}"]) for key in ("gpu_memory_utilization", "max_model_len")),
    ({ARGS: {"enable_sleep_mode": False}}, ["set rollout.vllm.sleep_level"]),
    ({ARGS: {"trust-remote-code": True}}, [f"{ARGS}.trust-remote-code"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("config"), resolve=True)


def changed(base: Any, overrides: dict[str, Any]) -> Any:
    values = copy.deepcopy(base)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    return values


@pytest.mark.parametrize(("overrides", "keys"), CASES, ids=[f"{n}-{keys[0]}" for n, (_, keys) in enumerate(CASES)])
def test_contradictions_are_refused_with_their_keys(base: Any, overrides: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        accept(changed(base, overrides))
    lines = str(caught.value).removeprefix("this configuration cannot run:").split("\n  - ")
    assert any(all(key in line for key in keys) for line in lines), str(caught.value)
    assert all(len(line) <= 620 for line in lines)


def test_there_are_many_contradictions() -> None:
    assert len(CASES) >= 150


def test_a_secret_of_the_environment_is_not_written_to_disk(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    for overrides, key in (
        ({"pair.chat.system": "x hf_0123456789abcdef y"}, "pair.chat.system"),
        ({ARGS: {"download": ["hf_0123456789abcdef"]}}, f"{ARGS}.download[0]"),
    ):
        with pytest.raises(ConfigError) as caught:
            accept(changed(base, overrides))
        assert key in str(caught.value) and "HF_TOKEN" in str(caught.value)
        assert "hf_0123456789abcdef" not in str(caught.value)
    assert accept(changed(base, {"pair.chat.system": "hf"}))
