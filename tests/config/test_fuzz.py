"""Random damage to composed configs: each is accepted, or refused by short messages that name key, value and remedy.

python -m tests.config.test_fuzz --cases 20000 --seed 0      prints the counts; exits with 1 at the first traceback
"""

# ruff: noqa: E501 (tables)
from __future__ import annotations

import argparse
import copy
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tests.composing import compose_raw

from tip_exp.config.parse import MAX_LENGTH, MAX_PROBLEMS, accept, digest, flatten, parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.config.schema import RunConfig
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir

BASES = (
    [],
    ["selector=full", "pair=self"],
    ["selector=q1", "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"],
    ["data=gsm8k", "eval=gsm8k", "learner=paper", "pair=qwen3_8b_to_4b"],
    ["data=mini_travel", "eval=mini_travel", "agent=default"],
    ["data=calculator", "eval=calculator", "agent=official"],
    ["mode=eval", "learner.estimator=topk", "selector=random"],
)
NUMBERS = [  # 10^4299: Python parses and prints no longer integer, so no configuration file holds one
    *(0, 1, -1, 2, 3, 7, 10**3, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**21, -(10**30), 10**4299, True, False),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 5e-324, 1e300, 1e38, 1 - 1e-17, 0.99999999, 1e21, -1e-9),
    *(float("inf"), float("-inf"), float("nan")),
]
TEXTS = [
    *("", " ", "auto", "none", "null", "all", "-1", "1e-3", "nan", "0x10", "yes", "~", "~nobody/x", ".", "..", "/", "//"),
    *("../../etc/passwd", "./nowhere", "/dev/null", "/proc/self/mem", "/root/x", "a/b", "a/b/c/d", "package:", "package:x"),
    *("org/name", "http://a/b", "a b", "a\nb", "a\0b", "\x1b[31m", "\ud83d", "名", "é" * 150, "x" * 300, "y" * 5000, "/" + "z" * 5000),
    *("os:system", "json:loads", ":", ":x", "x:", "..:x", "a" * 400 + ":b", "tip_exp.selector.scores:soft_or", "this@x", "@", "x:y@z"),
    *("soft_or", "full", "q1", "random", "jsd", "topk", "sampled_k1", "reverse_kl", "forward_kl", "bfloat16", "float16", "cuda"),
    *("train", "test", "eval", "teacher", "positive", "bottom", "sample", "rank", "batch", "drop", "offload", "vllm", "table", "travel"),
    *("${nobody}", "${seed}", "${name}", "${pair}", "${..label}", "${", "${}", "$", "???", "${nores:1}", "${percent:x}", "${percent:}"),
    *("${oc.env:NO_SUCH_VARIABLE}", "${in_root:x}", "${rule_name:1}", "${ranks_or:a}", "${pair.${seed}}", "{prompt}", "{solution}"),
]  # fmt: skip
NESTED: Any = []
for _ in range(60):
    NESTED = [NESTED]
OTHERS: list[Any] = [
    *(None, [], {}, [None], [1, 2, 3], [0.9, 0.95], [0.8, 0.2], ["a"], [[]], {"a": 1}, {"kind": "table"}, {"kind": "no"}, {"": 0}, {1: 2}),
    *({"kind": None}, {"rank": 1}, {"template": "{prompt}{answer}", "max_tokens": 5}, NESTED, list(range(1000)), b"bytes"),
]  # fmt: skip


@cache
def bases(resolved: bool = False) -> list[Any]:
    """Composed configs as plain values, with their interpolations or with what these name."""
    register_resolvers()
    composed = [compose_raw(overrides) for overrides in BASES]
    return [OmegaConf.to_container(config, resolve=resolved) for config in composed]


def paths_of(values: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all sections and leaves."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, key))


def damaged(rng: random.Random, resolved: bool) -> Any:
    """A base with one to four of: another value, a missing key, a misspelt or foreign key, a section from elsewhere."""
    values = copy.deepcopy(rng.choice(bases(resolved)))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        path = rng.choice(list(paths_of(values)))
        section: Any = values
        for key in path[:-1]:
            section = section[key]
        key = path[-1]
        kind = rng.randrange(18)
        if kind < 8:
            section[key] = rng.choice(rng.choice((NUMBERS, TEXTS, TEXTS, OTHERS)))
        elif kind == 8:
            del section[key]
        elif kind == 9:  # a typo: the value stands under another name
            name = str(key)
            position = rng.randrange(len(name) + 1)
            section[name[:position] + rng.choice("aeiou_.-") + name[position + 1 :]] = section.pop(key)
        elif kind == 10:
            section[rng.choice(("foo", "lr", "x" * 700, "a.b", "??", "label"))] = rng.choice(NUMBERS)
        elif kind == 11:
            other = rng.choice(bases(resolved))
            section[key] = copy.deepcopy(other[rng.choice(list(other))])
        else:  # what another base has there, or a number of the same size
            other = rng.choice(bases(resolved))
            for part in path:
                other = other.get(part) if isinstance(other, dict) else None
            near = isinstance(section[key], int | float) and rng.random() < 0.7
            section[key] = (
                type(section[key])(section[key] * rng.choice((0, 0.5, 2, 10))) if near else copy.deepcopy(other)
            )
    return values


def outcome(values: Any, keys: set[str], resolved: bool) -> str:
    """ "accepted" or "refused"; any error but a short ConfigError that names a key is an error of this function."""
    try:
        config = accept(values) if resolved else parse(OmegaConf.create(values))
    except (ConfigError, OmegaConfBaseException) as error:
        if isinstance(error, ConfigError):
            check_message(str(error), keys)
        else:
            assert type(error).__name__ in OUTSIDE, f"{type(error).__name__}: {error}"
        return "refused"
    assert digest(config) and isinstance(config, RunConfig)
    return "accepted"


OUTSIDE = {"UnsupportedValueType", "KeyValidationError", "GrammarParseError"}  # OmegaConf.create, before parse


def check_message(text: str, keys: set[str]) -> None:
    lines = text.removeprefix("this configuration cannot run:").strip().split("\n  - ")
    assert len(lines) <= MAX_PROBLEMS + 1, text
    for line in lines:
        assert len(line) <= MAX_LENGTH + 10, line
        assert "Traceback" not in line and "pydantic" not in line, line
        words = {word.strip(":;,()") for word in line.replace("=", " ").split()}
        named = any(key in words or f"{key}." in line or f"{key}[" in line for key in keys)
        assert named or "more errors" in line or "the configuration" in line, line
        assert any(
            mark in line
            for mark in ("; ", "choose", "needs", "must", ": no ", "cannot", "more errors", "remove it", "set ")
        ), line


def fuzz(cases: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    schema_keys = {key for base in bases() for key in (*flatten(base), *base)}
    counts: Counter[str] = Counter()
    for case in range(cases):
        resolved = rng.random() < 0.85  # OmegaConf takes most of the time
        values = damaged(rng, resolved)
        keys = schema_keys | set(map(str, flatten(values))) | {".".join(path) for path in paths_of_any(values)}
        try:
            counts[outcome(values, keys, resolved)] += 1
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}: {type(error).__name__}: {str(error)[:1500]}") from error
    return counts


def paths_of_any(values: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*prefix, str(key))
        if isinstance(value, dict):
            yield from paths_of_any(value, (*prefix, str(key)))


def test_damaged_configs_are_accepted_or_refused_in_words() -> None:
    counts = fuzz(700, seed=0)
    assert counts["refused"] > 300 and counts["accepted"] > 70


@pytest.mark.slow
def test_many_damaged_configs_are_accepted_or_refused_in_words() -> None:
    assert sum(fuzz(20_000, seed=1).values()) == 20_000


OVERRIDES = (
    *("seed=4294967296", "+pair.privileged.foo=1", "name={long}", "data=gsm8k data.train.file={long}", "num_threads=99999999"),
    *("logger.rollouts_per_eval=1e21", "rollout.temperature=1e-300", "learner.lr=${nobody}", "seed=???", "eval.samples=-1"),
    *("learner=${learner}", "pair.teacher.path=???", "+eval.benchmarks.b={kind:x}", "~seed", "~pair.teacher", "selector=null"),
    *("data.train=1", "eval.benchmarks=[]", "pair=null", "+x.y.z=1", "name=${name}", "pair.student.path=a\\ b", "ranks=0x10"),
)  # fmt: skip


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_damaged_overrides_are_refused_in_words(overrides: str) -> None:
    refused = (ConfigError, HydraException, OmegaConfBaseException)
    expected = (*refused, ValueError) if overrides.endswith("=null") else refused
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), pytest.raises(expected) as caught:
        parse(compose("config", overrides=overrides.replace("{long}", "x" * 5000).split(" ")))
    if isinstance(caught.value, ConfigError):
        check_message(
            str(caught.value), {*flatten(bases()[0]), *("eval.benchmarks.b", "x", "pair", "data.train", "selector")}
        )


@pytest.mark.slow
def test_many_damaged_overrides_are_refused_in_words() -> None:
    rng, keys = random.Random(0), sorted(flatten(bases()[0]))
    for _ in range(300):
        value = rng.choice([text for text in TEXTS if text.isprintable() and " " not in text] + NUMBERS[:14])
        override = f"{rng.choice(('', '', '+', '~', '++'))}{rng.choice(keys)}={value}"
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                parse(compose("config", overrides=[override]))
        except (ConfigError, HydraException, OmegaConfBaseException):
            pass
        except ValueError as error:  # tip-exp shows Hydra's own as one message
            assert any("/hydra/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[2:]), override


def test_a_section_may_be_damaged_in_each_of_its_keys() -> None:
    """Each key of the base, with each kind of value, alone: no error but a ConfigError."""
    base = bases(resolved=True)[0]
    for path in [path for path in paths_of(base) if len(path) == 1]:
        for value in (*NUMBERS[::4], *OTHERS):
            outcome(base | {path[0]: value}, {path[0]}, resolved=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(dict(fuzz(options.cases, options.seed)))
