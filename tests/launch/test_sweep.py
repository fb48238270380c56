"""Which runs a sweep has, what the plan says of each, and that nothing is run twice."""

from __future__ import annotations

import fcntl
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tests import synthetic_runs

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.launch import gpu_lock as lease
from tip_exp.launch.gpu_lock import leased_gpus, visible_gpus
from tip_exp.launch.launch import State, launch, state_of
from tip_exp.launch.plan import clock, plan, told
from tip_exp.launch.reuse import finished_digests
from tip_exp.launch.sweep import RunComposer, expand
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import summarize
from tip_exp.utils.paths import conf_dir

SWEEPS = conf_dir().parent / "sweeps"


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
    planned = plan(SWEEPS / "demo.yaml", ["seed=7"])
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["selector=q3", "selector.retention=0.2", "seed=3", "learner.betas=[0.8,0.9]", "sweep=null"],
        ["experiment=quick", "selector=full", "learner.lr=1e-3"],
        ["++selector.clip.entropy=0.9", "selector=soft_or", "name=other"],
    ],
)
def test_a_composed_run_is_what_hydra_composes(overrides: list[str]) -> None:
    calls: list[list[str]] = []

    def by_hydra(chosen: list[str]) -> DictConfig:
        calls.append(chosen)
        return compose("config", overrides=chosen)

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        quick = RunComposer(by_hydra)
        expected = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
        assert OmegaConf.to_container(quick(overrides), resolve=True) == expected
        assert OmegaConf.to_container(quick(overrides), resolve=True) == expected  # the kept one was not changed
        assert len(calls) == 1
        with pytest.raises(Exception, match=r"Could not override 'selector.retenton'"):
            quick(["selector.retenton=0.5"])


def finished(sweep: str, root: Path, *arguments: str) -> list[RunFolder]:
    """Every run of a sweep as a folder below `root` that says it is done."""
    folders = []
    for one in plan(SWEEPS / f"{sweep}.yaml", list(arguments)):
        assert one.config and one.folder
        folder = root / one.folder.root
        synthetic_runs.write_config(one.config, folder)
        synthetic_runs.finish(one.config, folder, 0.5)
        folders.append(RunFolder(folder))
    return folders


def tip_exp(cwd: Path, *arguments: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tip_exp", "-cd", str(SWEEPS), *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=seconds)


def test_a_finished_sweep_of_a_hundred_runs_is_relaunched_in_seconds(tmp_path: Path) -> None:
    folders = finished("demo_seeds", tmp_path, "seed=range(25)")
    assert len(folders) == 100
    before, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = tip_exp(tmp_path, "-cn", "demo_seeds", "seed=range(25)")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    assert done.returncode == 0, done.stderr
    assert "100 of 100 runs are already finished" in done.stdout
    print(f"relaunch: {time.monotonic() - before:.1f} s, of which computing {busy:.1f} s")
    assert busy < 15


def test_a_run_that_another_sweep_finished_is_linked(
    tmp_path: Path,
    compose_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    twin = finished("demo_table3", Path(), "seed=0")[0]
    twin.metrics.write_text('{"step": 0}\n')
    config = compose_run("selector=full", "sweep=demo_table5")
    lines, states = told(plan(SWEEPS / "demo_table5.yaml", ["seed=0"]), Path("outputs"))
    assert states["done elsewhere"] == 3 and states[State.TO_DO] == 2  # full and both entropy samplings
    assert lines[0].startswith("done elsewhere") and str(twin.root) in lines[0] and "left to run: about" in lines[-1]
    folder = RunFolder(Path("outputs/sweeps/demo_table5") / config.name)
    launch(config, folder)
    assert f"the same run is finished in {twin.root}; its files are linked here" in capsys.readouterr().out
    assert state_of(config, folder) is State.DONE and folder.metrics.samefile(twin.metrics)
    result = json.loads(folder.result.read_text())
    assert result["reused_from"] == str(twin.root) and result["digest"] == digest(config)
    assert finished_digests(Path("outputs"))[digest(config)] == twin  # originals come before links
    arms = summarize(read_runs([Path("outputs")]))
    assert [arm.seeds for arm in arms if arm.selector == "full"] == [1]  # and count once


@pytest.mark.parametrize(
    ("seconds", "expected"), [(48, "48 s"), (150, "2.5 min"), (3600, "60 min"), (9000, "2.5 h"), (864_000, "10 d")]
)
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


def test_gpus_are_leased_one_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    asked, devices = {lease.REQUEST: "1"}, ["4", "5"]
    with leased_gpus({}, devices) as free:
        assert free == {}
    with leased_gpus(asked, []) as nothing:
        assert nothing == {}
    with leased_gpus(asked, devices) as first, leased_gpus(asked, devices) as second:
        assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with leased_gpus({lease.REQUEST: "2"}, devices) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "4,5"}
    with (
        pytest.raises(ValueError, match="TIP_EXP_GPUS_PER_RUN=3, but there are 2 GPUs"),
        leased_gpus({lease.REQUEST: "3"}, devices),
    ):
        pass
    with (tmp_path / "locks" / "4.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with leased_gpus(asked, devices) as left:
            assert left == {"CUDA_VISIBLE_DEVICES": "5"}
    assert (
        visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
        and visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    )


TINY = ["learner.num_steps=2", "learner.warmup_steps=0", "learner.prompts_per_step=4", "eval.samples=1", "logger=files"]
TINY += ["eval.benchmarks.word_sums.num_problems=4", "eval.teacher=false", "eval.greedy=false", "num_threads=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=gpus", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_processes"],
        [
            "hydra/launcher=ray_cluster",
            "hydra.launcher.ray.init.address=null",
            "+hydra.launcher.ray.init.num_cpus=2",
            "hydra.launcher.ray.remote.num_gpus=0",
            "hydra.launcher.ray.remote.num_cpus=1",
        ],
    ],
    ids=["joblib", "submitit", "ray"],
)
def test_a_tiny_sweep_by_launcher(tmp_path: Path, launcher: list[str]) -> None:
    plugin = {"gpus": "hydra_joblib_launcher", "submitit_processes": "hydra_submitit_launcher"}
    pytest.importorskip(f"hydra_plugins.{plugin.get(launcher[0].split('=')[1], 'hydra_ray_launcher')}")
    arguments = ["-cn", "demo_table6", "seed=0", *TINY, *launcher]
    done = tip_exp(tmp_path, *arguments, seconds=400)
    assert done.returncode == 0, done.stderr
    results = sorted(tmp_path.glob("outputs/sweeps/demo_table6/*/result.json"))
    assert len(results) == 3
    again = tip_exp(tmp_path, *arguments)
    assert again.returncode == 0 and "3 of 3 runs are already finished" in again.stdout


@pytest.mark.parametrize("name", ["gpus", "slurm", "submitit_processes"])
def test_launchers_compose(name: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    wanted = {"gpus": "Joblib", "slurm": "Slurm", "submitit_processes": "Local"}[name]
    assert wanted in config.hydra.launcher._target_
    assert (name == "gpus") == ("TIP_EXP_GPUS_PER_RUN" in config.hydra.job.env_set)


def test_quick_demos_share_what_they_can() -> None:
    """All quick demos with one seed: how many runs, and how many of them are run at all (20 minutes at 40 s each)."""
    digests: list[str] = []
    for path in sorted(SWEEPS.glob("demo_*.yaml")):
        tools = path.stem == "demo_table7"
        planned = plan(path, ["experiment=quick_tools" if tools else "experiment=quick", "seed=0"])
        assert [one.error for one in planned] == [None] * len(planned)
        assert {one.folder.root.parent for one in planned if one.folder} == {Path("outputs/quick") / path.stem}
        digests += [digest(one.config) for one in planned if one.config]
    assert len(digests) > len(set(digests))
    assert len(set(digests)) <= 28


def test_make_demos_runs_every_demo_sweep() -> None:
    (line,) = [line for line in (SWEEPS.parent / "Makefile").read_text().splitlines() if line.startswith("DEMOS")]
    assert set(line.split()[2:]) == {path.stem for path in SWEEPS.glob("demo_*.yaml")}
