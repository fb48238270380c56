"""Which runs a sweep has, how they are composed, and that finished runs are linked or skipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tests import synthetic_runs

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import CARDS
from tip_exp.estimate.forecast import Forecast
from tip_exp.launch.launch import State, launch, state_of
from tip_exp.launch.plan import DONE_ELSEWHERE, format_plan, main, plan, tables
from tip_exp.launch.reuse import finished_digests
from tip_exp.launch.sweep import RefusedRun, RunComposer, SweepRun, expand, folder_name
from tip_exp.launch.teacher import TEACHERS, teacher_config
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import summarize
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir
from tip_exp.utils.units import format_duration

SWEEPS = conf_dir().parent / "sweeps"


def accepted(runs: list[SweepRun | RefusedRun]) -> list[SweepRun]:
    assert not [run for run in runs if isinstance(run, RefusedRun)]
    return [run for run in runs if isinstance(run, SweepRun)]


def tip_exp(cwd: Path, *arguments: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tip_exp", "-cd", str(SWEEPS), *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=seconds)


def test_lines_times_grid() -> None:
    assert expand(["a=1 b=2", "a=3"], {"seed": "0,1"}, ["c=9"]) == [
        ["a=1", "b=2", "seed=0", "c=9"],
        ["a=1", "b=2", "seed=1", "c=9"],
        ["a=3", "seed=0", "c=9"],
        ["a=3", "seed=1", "c=9"],
    ]


def test_a_line_can_be_a_grid() -> None:
    assert expand(["a=1,2 b=3,4", "a=1 b=4"], {"seed": "0"}, []) == [
        ["a=1", "b=3", "seed=0"],
        ["a=1", "b=4", "seed=0"],
        ["a=2", "b=3", "seed=0"],
        ["a=2", "b=4", "seed=0"],
    ]
    assert expand(["a=1,2 b=3"], {}, ["a=5"]) == [["b=3", "a=5"]]


def test_a_quoted_value_may_hold_spaces() -> None:
    line = """name='x y',"it's z" sweep='a\\' b' seed=1"""
    assert expand([line], {}, []) == [
        ["name='x y'", "sweep='a\\' b'", "seed=1"],
        ['name="it\'s z"', "sweep='a\\' b'", "seed=1"],
    ]
    for torn in ("a=1 b='x y", "a = 3"):
        with pytest.raises(ConfigError, match=r"hydra\.sweeper\.runs: [\"']" + re.escape(torn) + r"[\"']: "):
            expand([torn], {}, [])


def test_grid_alone_and_line_alone() -> None:
    assert expand([], {"x": "1,2"}, []) == [["x=1"], ["x=2"]]
    assert expand(["x=1", "x=2"], {}, []) == [["x=1"], ["x=2"]]
    assert expand(["x=1", "x=1"], {"y": "0,0"}, ["z=1,1"]) == [["x=1", "y=0", "z=1"]]


def test_the_command_line_replaces_swept_keys() -> None:
    assert expand(["a=1 b=2", "a=3 b=2"], {"seed": "0,1"}, ["seed=7", "a=5"]) == [["b=2", "seed=7", "a=5"]]
    assert expand(["a=1"], {}, ["seed=range(2)"]) == [["a=1", "seed=0"], ["a=1", "seed=1"]]


def test_plan_of_the_demo() -> None:
    runs = accepted(plan(SWEEPS / "demo.yaml", ["seed=7"]))
    assert len(runs) == 8
    assert {run.config.seed for run in runs} == {7}
    assert runs[0].folder == RunFolder(Path("outputs/sweeps/demo/tiny.word_sums.full.r100.s7"))


def test_the_plan_has_the_runs_that_the_command_names() -> None:
    line = 'hydra.sweeper.runs=["selector=full","selector=q3 selector.retention=0.2"]'
    runs = accepted(plan(SWEEPS / "demo.yaml", [line, "hydra.sweeper.jobs=1", "seed=7"]))
    assert [run.folder.root.name for run in runs] == ["tiny.word_sums.full.r100.s7", "tiny.word_sums.q3.r20.s7"]


def test_runs_that_their_names_do_not_part_get_folders_of_their_own() -> None:
    runs = accepted(plan(SWEEPS / "demo.yaml", ["learner.lr=1e-3,2e-3", "learner.divergence=jsd"]))
    names = [run.folder.root.name for run in runs]
    assert len({*names}) == 16 and names[:2] == [f"tiny.word_sums.full.r100.s0.lr{lr}" for lr in (0.001, 0.002)]
    assert all(
        run.config.name == name and run.overrides[-1] == f"name='{name}'" for run, name in zip(runs, names, strict=True)
    )
    search = accepted(plan(SWEEPS / "registered_search.yaml", []))
    assert len({run.folder.root for run in search}) == len({digest(run.config) for run in search}) == len(search) == 132


def test_a_name_of_any_characters_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    for name in ("ckpt=3.${seed}", "my run (1)", "it's"):
        (tmp_path / "mine.yaml").write_text(f'defaults: [config, _self_]\nname: "{name}"\nsweep: mine\n')
        runs = accepted(plan(tmp_path / "mine.yaml", ["learner.lr=1e-3,2e-3"]))
        expected = [f"{name.replace('${seed}', '0')}.lr{lr}" for lr in (0.001, 0.002)]
        assert [run.folder.root.name for run in runs] == [run.config.name for run in runs] == expected


def test_a_run_that_cannot_start_is_refused_with_its_reason(tmp_path: Path) -> None:
    runs = plan(SWEEPS / "demo.yaml", ["learner.lr=-1"])
    assert all(isinstance(run, RefusedRun) and "learner.lr" in run.error for run in runs)
    lines, states = format_plan(runs, tmp_path)
    assert states == {"cannot run": 8} and lines[0].startswith("cannot run      selector=full learner.lr=-1: ")


def test_lengths_beyond_the_positions_are_refused_as_by_a_run(tmp_path: Path) -> None:
    message = (
        "data.max_prompt_tokens (500) + data.max_response_tokens (72) = 572, but pair.teacher.path="
        "package:tiny/teacher has 512 positions; lower one of them"
    )
    lines, states = format_plan(plan(SWEEPS / "demo.yaml", ["data.max_prompt_tokens=500"]), tmp_path)
    assert states == {"cannot run": 8} and lines[0].endswith(message)
    with pytest.raises(ConfigError, match=re.escape(message)):
        tables("memory", ["data.max_prompt_tokens=500"], CARDS[80])


def test_the_plan_says_how_many_gpus_a_run_needs(tmp_path: Path) -> None:
    lines, _ = format_plan(plan(SWEEPS / "table4.yaml", []), tmp_path, CARDS[80])
    for pair, ranks in {"tip_qwen3": 2, "tip_llama": 8, "tip_qwen25": 2}.items():
        of_pair = [line for line in lines if f" {pair}." in line]
        assert len(of_pair) == 3 and all(line.endswith(f"computed for {ranks} x H100") for line in of_pair)
    assert lines[-2].startswith("left to run: about")
    assert lines[-1].startswith("the 9 computed by number of GPUs: 8 x H100: ")
    lines, _ = format_plan(plan(SWEEPS / "table4.yaml", ["experiment=tip_llama", "ranks=2"]), tmp_path, CARDS[80])
    assert lines[0].endswith("computed for 8 x H100; 2 do not hold it")
    small = ["experiment=tip_llama", "rollout.vllm.gpu_memory_utilization=0.1"]  # 8 GiB for weights of 15
    lines, _ = format_plan(plan(SWEEPS / "table4.yaml", small), tmp_path, CARDS[80])
    assert lines[0].endswith("-  fits no number of GPUs") and lines[-1].startswith("left, but without a time: 3 runs")


def test_the_evaluation_of_a_teacher_that_runs_share_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no evaluation is finished here
    runs = accepted(plan(SWEEPS / "demo.yaml", ["seed=7"]))

    def forecast(config: RunConfig) -> Forecast:  # 1000 s a run, 10,000 s its teacher
        return Forecast(1.0, 1e3 + 1e4 * config.eval.teacher, "measured")

    monkeypatch.setattr("tip_exp.launch.plan.Forecaster", lambda *_: forecast)
    lines, states = format_plan(runs, tmp_path)
    assert states == {"to do": 8}
    assert sum("3.1 h" in line for line in lines) == 1  # 11,000 s; the others 1000 s
    assert lines[-1].startswith("left to run: about 5.0 h one after another")
    finish_teacher = TEACHERS / digest(teacher_config(runs[0].config))
    finish_teacher.mkdir(parents=True)
    (finish_teacher / "result.json").write_text('{"digest": ""}')
    assert format_plan(runs, tmp_path)[0][-1].startswith("left to run: about 2.2 h")


@pytest.mark.parametrize(("kind", "first"), [("memory", "GiB of a rank at its peak"), ("time", "Seconds of a step")])
def test_tables_of_a_run(
    kind: str, first: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tip-plan", kind, "experiment=tip_qwen3", "--card", "48"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith(first) and "| 8 " in printed
    assert ("by phase, 48 GB (L40S)" if kind == "memory" else "Seconds of a step on L40S") in printed
    monkeypatch.setattr(sys, "argv", ["tip-plan", kind, "--card", "48", "experiment=tip_qwen3"])
    main()
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(sys, "argv", ["tip-plan", kind, "learner.lr=-1"])
    with pytest.raises(SystemExit):
        main()
    assert "learner.lr" in capsys.readouterr().err
    for wrong, message in (
        ("selector=null", "these overrides cannot be composed"),
        ("learner.rl=1", "learner.rl is not a key; did you mean learner.lr?"),
    ):
        monkeypatch.setattr(sys, "argv", ["tip-plan", kind, wrong])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "lr", "expected"),
    [
        ([], "2e-3", State.TO_DO),
        (["config.yaml"], "2e-3", State.TO_DO),  # ended before its first checkpoint
        (["config.yaml", "checkpoint/step_00020/x"], "2e-3", State.UNFINISHED),
        (["config.yaml", "result.json"], "2e-3", State.UNFINISHED),  # result.json is empty
        (["config.yaml", "result.json"], "3e-3", State.CHANGED),
        (["config.yaml", "checkpoint/step_00020/x"], "3e-3", State.CHANGED),
        (["result.json"], "2e-3", State.CHANGED),  # without config.yaml the result's config is unknown
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
def test_the_composer_gives_what_hydra_gives(overrides: list[str]) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composer = RunComposer(lambda chosen: compose("config", overrides=chosen))
        expected = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
        first = composer(overrides)
        assert OmegaConf.to_container(first, resolve=True) == expected
        first.seed = 99  # a caller may change what it gets
        assert OmegaConf.to_container(composer(overrides), resolve=True) == expected
        with pytest.raises(Exception, match=r"Could not override 'selector.retenton'"):
            composer(["selector.retenton=0.5"])


def test_a_hundred_runs_take_one_call_of_hydra_per_choice_of_groups() -> None:
    calls: list[list[str]] = []

    def counted(chosen: list[str]) -> DictConfig:
        calls.append(chosen)
        return compose("config", overrides=chosen)

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composer = RunComposer(counted)
        for selector in ("full", "soft_or"):
            for seed in range(50):
                config = composer([f"selector={selector}", f"seed={seed}", "learner.lr=1e-3"])
                assert (config.seed, config.selector.label) == (seed, selector)
    assert calls == [["selector=full"], ["selector=soft_or"]]


def finished_sweep(sweep: str, root: Path, *arguments: str) -> list[RunFolder]:
    """Write a finished run folder below `root` for every run of a sweep."""
    folders = []
    for run in accepted(plan(SWEEPS / f"{sweep}.yaml", list(arguments))):
        folder = root / run.folder.root
        synthetic_runs.write_config(run.config, folder)
        synthetic_runs.finish(run.config, folder, 0.5)
        folders.append(RunFolder(folder))
    return folders


def test_a_finished_sweep_starts_no_process(tmp_path: Path) -> None:
    folders = finished_sweep("demo_seeds", tmp_path, "seed=range(3)")
    done = tip_exp(tmp_path, "-cn", "demo_seeds", "seed=range(3)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "27 of 27 runs are already finished in outputs/sweeps/demo_seeds\n"
    assert not [folder for folder in folders if folder.log.exists() or folder.lock.exists()]


def test_a_damaged_run_and_an_unwritable_disk_are_named_and_fail_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hurt = finished_sweep("demo_seeds", Path(), "seed=0")[0]
    hurt.result.write_text(json.dumps(json.loads(hurt.result.read_text()) | {"sha256": "0"}))
    monkeypatch.setattr(sys, "argv", ["tip-plan", "demo_seeds", "seed=0"])
    with pytest.raises(SystemExit) as ended:
        main()
    line = capsys.readouterr().out.splitlines()[0]
    assert ended.value.code == 1 and line.startswith(f"damaged         {hurt.root.name} ")
    assert line.endswith("(result.json does not agree with its own SHA-256)")

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tip_exp.launch.plan.format_plan", fail)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err == "error: No space left on device\n"


@pytest.mark.parametrize(
    ("config_name", "arguments", "expected"),
    [
        ("table5", "selector=full,q3", "table5"),
        ("config", "selector=full,q3 selector.retention=0.2,0.5 seed=1", "selector-retention"),
        ("config", "seed=range(3) sweep=mine", "mine"),
        ("config", "seed=1", "config"),
    ],
)
def test_the_folder_of_a_sweep(config_name: str, arguments: str, expected: str) -> None:
    assert folder_name(config_name, arguments.split()) == expected


def test_a_plain_sweep_has_a_folder_of_its_own(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    for seed in (0, 1):
        config = compose_run("selector=full", f"seed={seed}")
        folder = tmp_path / "outputs" / "sweeps" / "seed" / config.name
        synthetic_runs.write_config(config, folder)
        synthetic_runs.finish(config, folder, 0.5)
    done = tip_exp(tmp_path, "-m", "selector=full", "seed=0,1", seconds=200)
    assert done.stdout == "2 of 2 runs are already finished in outputs/sweeps/seed\n", done.stderr


def test_a_run_that_another_sweep_finished_is_linked(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = finished_sweep("demo_table3", Path(), "seed=0")[0]
    original.metrics.write_text('{"step": 0}\n')
    config = compose_run("selector=full", "sweep=demo_table5")
    lines, states = format_plan(plan(SWEEPS / "demo_table5.yaml", ["seed=0"]), Path("outputs"))
    assert states[DONE_ELSEWHERE] == 3 and states[State.TO_DO] == 2  # full and both entropy samplings are done
    assert lines[0].startswith("done elsewhere") and str(original.root) in lines[0]
    assert "left to run: about" in lines[-1]
    folder = RunFolder(Path("outputs/sweeps/demo_table5") / config.name)
    assert launch(config, folder) == f"linked from {original.root}, which holds the same run"
    assert state_of(config, folder) is State.DONE and folder.metrics.samefile(original.metrics)
    result = json.loads(folder.result.read_text())
    assert result["reused_from"] == str(original.root) and result["digest"] == digest(config)
    assert finished_digests(Path("outputs"))[digest(config)] == original  # originals come before links
    arms = summarize(read_runs([Path("outputs")]))
    assert [arm.seeds for arm in arms if arm.selector == "full"] == [1]  # a run and its link are one seed


@pytest.mark.parametrize(
    ("seconds", "expected"), [(48, "48 s"), (150, "2.5 min"), (3600, "60 min"), (9000, "2.5 h"), (864_000, "10 d")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


TINY = ["learner.num_steps=2", "learner.warmup_steps=0", "learner.prompts_per_step=4", "eval.samples=1", "logger=files"]
TINY += ["eval.benchmarks.word_sums.num_problems=4", "eval.teacher=false", "eval.greedy=false", "num_threads=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=submitit_processes"],
        [
            "hydra/launcher=ray_cluster",
            "hydra.launcher.ray.init.address=null",
            "+hydra.launcher.ray.init.num_cpus=2",
            "hydra.launcher.ray.remote.num_gpus=0",
            "hydra.launcher.ray.remote.num_cpus=1",
        ],
    ],
    ids=["submitit", "ray"],
)
def test_a_tiny_sweep_by_launcher(tmp_path: Path, launcher: list[str]) -> None:
    is_ray = launcher[0].endswith("ray_cluster")
    pytest.importorskip(f"hydra_plugins.hydra_{'ray' if is_ray else 'submitit'}_launcher")
    arguments = ["-cn", "demo_table6", "seed=0", *TINY, *launcher]
    done = tip_exp(tmp_path, *arguments, seconds=400)
    assert done.returncode == 0, done.stderr
    results = sorted(tmp_path.glob("outputs/sweeps/demo_table6/*/result.json"))
    assert len(results) == 3
    again = tip_exp(tmp_path, *arguments)
    assert again.returncode == 0 and "3 of 3 runs are already finished" in again.stdout


def launcher_of(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True).hydra.launcher


def test_slurm_reserves_a_gpu_per_rank_on_each_node() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = launcher_of("hydra/launcher=slurm", "ranks=4", "nodes=2")
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.tasks_per_node, launcher.nodes) == (4, 1, 2)
    assert launcher_of("hydra/launcher=slurm").gpus_per_node == 8  # ranks=auto
    assert launcher_of("hydra/launcher=submitit_processes")._target_.endswith("LocalLauncher")


def test_ray_requests_a_gpu_per_rank() -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    launcher = launcher_of("hydra/launcher=ray_cluster", "ranks=4")
    assert launcher.ray.remote.num_gpus == 4
    assert launcher.ray.init == {"address": "auto", "object_store_memory": None}


def test_quick_demos_share_their_runs() -> None:
    """All quick demos with one seed: sweeps share runs, and at most 34 remain (23 minutes at 40 s each)."""
    digests: list[str] = []
    quick = set(SWEEPS.glob("demo_*.yaml")) - {
        SWEEPS / f"demo_{name}.yaml" for name in ("leaderboard", "students", "sgd")
    }  # as in the Makefile
    for path in sorted(quick):
        tools = path.stem == "demo_table7"
        runs = accepted(plan(path, ["experiment=quick_tools" if tools else "experiment=quick", "seed=0"]))
        assert {run.folder.root.parent for run in runs} == {Path("outputs/quick") / path.stem}
        digests += [digest(run.config) for run in runs]
    assert len(digests) > len(set(digests))
    assert len(set(digests)) <= 34
