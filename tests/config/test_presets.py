"""The values of every preset against presets.md, their table with sources, and TIP's settings as runs get them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tests.datasets import SMALL

from tip_exp.config.schema import RunConfig
from tip_exp.utils.paths import conf_dir

Compose = Callable[..., RunConfig]
GROUPS = ("learner", "eval", "selector", "rollout", "experiment", "pair")
SECTIONS = ("quadrants", "pair", "rollout", "selector", "learner", "eval")  # of conf/config.yaml
NOT_VALUES = ("label", "name", "defaults", "hydra")
WORLD = Path(__file__).parents[1] / "envs" / "deepplanning" / "world"

# TIP, Table 9, as the runs of its experiments get it: key -> (Qwen3-8B -> 4B, Llama 70B -> 8B, Qwen2.5-14B -> 1.5B)
TABLE_9: dict[str, tuple[Any, Any, Any]] = {
    "pair.teacher.path": ("Qwen/Qwen3-8B", "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen2.5-14B-Instruct"),
    "pair.student.path": ("Qwen/Qwen3-4B", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    "learner.lr": (1e-6, 3e-7, 1e-6),
    "learner.schedule": ("cosine",) * 3,
    "learner.average": ("rollout",) * 3,  # Eq. 1, 8 and 9
    "learner.prompts_per_step": (8,) * 3,  # "batch 8"; the paper does not say of what
    "learner.samples_per_prompt": (16,) * 3,
    "learner.micro_batch_tokens": (16384,) * 3,  # "OPD length"
    "data.max_prompt_tokens": (2048,) * 3,
    "data.max_response_tokens": (8192,) * 3,
    "rollout.temperature": (1.0,) * 3,
    "rollout.top_p": (1.0,) * 3,
    "rollout.top_k": (0,) * 3,
    "eval.samples": (16,) * 3,
    "eval.temperature": (1.0,) * 3,
    "eval.top_p": (1.0,) * 3,
    "eval.max_tokens": (8192,) * 3,
    "data.train.label": ("dapo_math",) * 3,
    # of the base code, where the paper is silent
    "learner.weight_decay": (0.1,) * 3,
    "learner.warmup_steps": (0,) * 3,
    "learner.grad_clip": (1.0,) * 3,
}
DEEPPLANNING = {  # TIP, Sec. 7.5, Table 7 and App. B.4
    "pair.teacher.path": "Qwen/Qwen3-14B",
    "pair.student.path": "Qwen/Qwen3-1.7B",
    "pair.chat.thinking": True,
    "learner.lr": 1e-6,
    "learner.schedule": "cosine",
    "learner.num_steps": 360,
    "eval.samples": 16,
    "eval.temperature": 1.0,
    "eval.max_tokens": 24576,  # base code
}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)"""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def values_of_conf() -> dict[tuple[str, str], Any]:
    """(option, key) -> value as it is in the YAML files; "config" is conf/config.yaml."""
    config: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    trees = {"config": {section: config[section] for section in SECTIONS}}
    for group in GROUPS:
        for path in sorted((conf_dir() / group).glob("*.yaml")):
            tree: Any = OmegaConf.to_container(OmegaConf.load(path))
            trees[f"{group}={path.stem}"] = {key: tree[key] for key in tree if key not in NOT_VALUES}
    return {(option, key): value for option, tree in trees.items() for key, value in leaves(tree)
            if value != "???"}  # fmt: skip


def rows_of_table() -> list[list[str]]:
    """option, key, value (JSON) and source of each row."""
    lines = (Path(__file__).parent / "presets.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    assert table[0] == ["option", "key", "value", "source"]
    return table[1:]


def test_every_preset_has_the_values_of_the_table() -> None:
    expected = {(option, key): json.loads(value) for option, key, value, _ in rows_of_table()}
    values = values_of_conf()
    assert {name: values.get(name, "no such key") for name in expected} == expected
    missing = [f"| {option} | {key} | {json.dumps(value)} | SOURCE |" for (option, key), value in values.items()
               if (option, key) not in expected]  # fmt: skip
    assert not missing, "rows that presets.md lacks"


def test_every_value_has_a_source() -> None:
    rows = rows_of_table()
    assert len(rows) == len({(option, key) for option, key, _, _ in rows}) > 200
    assert all(source for *_, source in rows)


def value_at(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


@pytest.mark.parametrize(("column", "experiment"), [(0, "tip_qwen3"), (1, "tip_llama"), (2, "tip_qwen25")])
def test_table_9(compose_run: Compose, column: int, experiment: str) -> None:
    config = compose_run(f"experiment={experiment}", f"data.root={SMALL}")
    assert {key: value_at(config, key) for key in TABLE_9} == {key: row[column] for key, row in TABLE_9.items()}
    assert set(config.eval.benchmarks) == {"math500", "aime24", "aime25"}
    assert config.selector.label == "soft_or" and config.selector.clip == {"entropy": 0.98}


def test_the_agentic_setting(compose_run: Compose) -> None:
    config = compose_run("experiment=tip_deepplanning", f"data.root={WORLD}")
    assert {key: value_at(config, key) for key in DEEPPLANNING} == DEEPPLANNING
