"""Which runs a sweep has, and what the plan says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tip_exp.config import RunConfig
from tip_exp.launch import State, state_of
from tip_exp.paths import RunFolder, conf_dir
from tip_exp.plan import plan
from tip_exp.sweeping import expand


def test_lines_times_grid() -> None:
    assert expand(["a=1 b=2", "a=3"], {"seed": "0,1"}, ["c=9"]) == [
        ["a=1", "b=2", "seed=0", "c=9"],
        ["a=1", "b=2", "seed=1", "c=9"],
        ["a=3", "seed=0", "c=9"],
        ["a=3", "seed=1", "c=9"],
    ]


def test_grid_alone_and_line_alone() -> None:
    assert expand([], {"x": "1,2"}, []) == [["x=1"], ["x=2"]]
    assert expand(["x=1", "x=2"], {}, []) == [["x=1"], ["x=2"]]


def test_the_command_line_takes_the_place_of_what_is_swept() -> None:
    assert expand(["a=1 b=2", "a=3 b=2"], {"seed": "0,1"}, ["seed=7", "a=5"]) == [["b=2", "seed=7", "a=5"]]
    assert expand(["a=1"], {}, ["seed=range(2)"]) == [["a=1", "seed=0"], ["a=1", "seed=1"]]


def test_plan_of_the_demo() -> None:
    planned = plan(conf_dir().parent / "sweeps" / "demo.yaml", ["seed=7"])
    assert len(planned) == 8
    assert {one.config.seed for one in planned if one.config} == {7}
    assert planned[0].folder == RunFolder(Path("outputs/sweeps/demo/tiny.word_sums.full.r100.s7"))


@pytest.mark.parametrize(
    ("files", "lr", "expected"),
    [
        ([], "2e-3", State.TO_DO),
        (["config.yaml"], "2e-3", State.TO_DO),  # died before its first checkpoint: nothing to lose
        (["config.yaml", "checkpoint/step_00020/x"], "2e-3", State.UNFINISHED),
        (["config.yaml", "result.json"], "2e-3", State.DONE),
        (["config.yaml", "result.json"], "3e-3", State.CHANGED),
        (["config.yaml", "checkpoint/step_00020/x"], "3e-3", State.CHANGED),
        (["result.json"], "2e-3", State.CHANGED),  # a result without its config cannot be trusted
    ],
)
def test_states(
    tmp_path: Path,
    compose_run: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], None],
    files: list[str],
    lr: str,
    expected: State,
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    if "config.yaml" in files:
        write_config(compose_run(), tmp_path)
    assert state_of(compose_run(f"learner.lr={lr}"), RunFolder(tmp_path)) is expected
