"""docs/scale.md: its tables are what the commands above them print, its worked step is the model's."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import CARDS, DEFAULT_CARD
from tip_exp.estimate.time import step_seconds
from tip_exp.launch.plan import tables
from tip_exp.utils.paths import conf_dir

PAGE = (conf_dir().parent / "docs" / "scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```text\n\$ tip-plan (\w+) ([^\n]+)\n(.*?)\n```", PAGE, flags=re.DOTALL)
PAIRS = ["tip_qwen3", "tip_qwen25", "tip_llama", "tip_deepplanning data.root=.", "tip_deepplanning_32b data.root=."]


@pytest.mark.parametrize(("kind", "arguments", "printed"), BLOCKS, ids=[f"{kind} {text}" for kind, text, _ in BLOCKS])
def test_tables_are_what_the_command_prints(kind: str, arguments: str, printed: str) -> None:
    assert printed == "\n\n".join(tables(kind, arguments.split(), CARDS[DEFAULT_CARD]))


def test_every_pair_has_its_tables() -> None:
    memory, time = ({text for kind, text, _ in BLOCKS if kind == wanted} for wanted in ("memory", "time"))
    experiments = {f"experiment={name}" for name in PAIRS}
    assert time == experiments and memory == experiments | {"experiment=consumer", "experiment=consumer_lora"}


def test_the_worked_step_is_the_models(compose_run: Callable[..., RunConfig]) -> None:
    step = step_seconds(compose_run("experiment=tip_qwen3"), CARDS[80], 8)
    rows = dict(re.findall(r"^\| ([\w ]+) \| .* \| (?:.*= )?([\d.]+) \|$", PAGE, flags=re.MULTILINE))
    for part, seconds in (step | {"step": sum(step.values())}).items():
        assert float(rows[part]) == pytest.approx(seconds, abs=0.06), part
    assert "has run on a GPU" in PAGE
