"""The commands as a user types them: real processes and files, kills and refused configs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tip_exp import __version__
from tip_exp.launch import cli
from tip_exp.launch.cli import with_overrides
from tip_exp.launch.help import unknown_name
from tip_exp.launch.lock import holder
from tip_exp.launch.words import misread
from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import conf_dir, resolve_model

NUM_STEPS = 20  # enough that a signal at step 8 comes before the end
SMALL = ["experiment=smoke", "logger=files", "eval.teacher=false", "num_threads=1", "learner.checkpoint_every=3"]
SMALL += [f"learner.num_steps={NUM_STEPS}"]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "tip_exp", f"hydra.run.dir={folder}", *SMALL, *overrides]


def tip_exp(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=300, cwd=folder.parent)


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A metrics row without times and memory."""
    measured = ("time/", "memory/")
    return {key: value for key, value in row.items() if not key.startswith(measured) and not key.endswith("_per_s")}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        rows = read_rows(RunFolder(folder).metrics)
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, f"ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def accept_ctrl_c() -> None:
    """A background job and its children ignore SIGINT; these tests may run as one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(line: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A command in a process group of its own, as in a terminal."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=cwd, text=True, stdout=pipe, stderr=pipe, start_new_session=True, preexec_fn=accept_ctrl_c
    )


def kill_at(folder: Path, step: int, how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start the run; when it logs the step, send a signal to launcher and child, as a terminal does.

    Rows of an earlier process do not count: the step is then the one after them.
    """
    rows = read_rows(RunFolder(folder).metrics)
    process = start(command(folder), folder.parent)
    wait_for_step(folder, max(step, rows[-1]["step"] + 1 if rows else 0), process)
    os.killpg(process.pid, how)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One uninterrupted small run."""
    folder = tmp_path_factory.mktemp("cli") / "whole"
    done = tip_exp(folder)
    assert done.returncode == 0, done.stderr
    folder.with_suffix(".txt").write_text(done.stdout)
    return RunFolder(folder)


def test_commands_load_no_heavy_library_before_a_run_starts() -> None:
    code = (
        "import sys, tip_exp.launch.cli, tip_exp.launch.plan, tip_exp.report.cli, hydra_plugins.tip_exp_sweeper; "
        "heavy = {'torch', 'transformers', 'wandb', 'vllm'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_wrong_key_needs_no_schema() -> None:
    """Hydra refuses it first; pydantic and the schema would double the time of the answer."""
    code = (
        "import sys; from tip_exp.launch.cli import main; sys.argv = ['tip-exp', 'selector.retenton=0.5']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2 and not {'pydantic', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_explains_options_and_the_keys_of_this_command(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tip_exp", "selector=q3", "--help"]
    helped = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    lines = helped.stdout.splitlines()
    meanings = {tuple(line.split(maxsplit=1)) for line in lines}
    assert ("random", "Uniformly drawn tokens: the baseline of equal budget.") in meanings
    assert "    label: q3  # in names of runs and in tables" in lines
    assert "    rounding: floor  # of retention x tokens: floor (TIP, Eq. 8) | ceil | at_least_one" in lines
    assert "    lr: 0.002  # of AdamW, the largest of the schedule" in lines, "not the remark of learner=tiny or =paper"
    assert lines.count("        num_problems: 256  # the first ones; null: all of a file") == 1, (
        "a benchmark's keys are those of a data set"
    )
    assert {"  show", "  compare", "  score"} <= {line[:9].rstrip() for line in lines}
    assert not list(tmp_path.iterdir())


def test_the_version(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tip_exp", "--version"]
    assert subprocess.run(line, capture_output=True, text=True, timeout=60).stdout == f"tip_exp {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("seed=1 -cd sweeps -cn demo", "seed=1 a=b -cd sweeps -cn demo"),
        ("-cd sweeps seed=1 name=x -cn demo", "-cd sweeps seed=1 name=x a=b -cn demo"),
        ("-m seed=1,2", "-m seed=1,2 a=b"),
        ("-cn demo", "-cn demo a=b"),
        ("", "a=b"),
    ],
)
def test_overrides_of_the_program_stand_beside_those_of_the_user(typed: str, expected: str) -> None:
    arguments = with_overrides(["tip-exp", *typed.split()], ["a=b"])
    assert arguments == ["tip-exp", *expected.split()]
    assert get_args_parser().parse_args(arguments[1:]).overrides[-1] == "a=b"


@pytest.mark.parametrize("arguments", ["--help", "--cfg job", "show --help"])
def test_a_reader_that_closes_early_leaves_no_message(tmp_path: Path, arguments: str) -> None:
    """`tip-exp … | head`, with a reader that reads nothing."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    line = [sys.executable, "-m", "tip_exp", *arguments.split()]
    ended = subprocess.run(line, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path)
    os.close(write_end)
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "selector.retenton=0.5",
            "selector.retenton is not a key; did you mean selector.retention?; `tip-exp --help` ",
        ),
        ("selector.retenton=0.5", " and +selector.retenton=0.5 adds one where a section takes new keys"),
        ("retention=0.5", "retention is not a key; did you mean selector.retention?"),
        ("selector={retenton: 0.5}", "selector.retenton is not a key; did you mean selector.retention?"),
        ("rollout.vllm.engine_args={seed: 7}", "rollout.vllm.engine_args.seed is not a key; `tip-exp --help` lists"),
        ("rollout.vllm.engine_args={seed: 7}", " and +rollout.vllm.engine_args.seed=VALUE adds one where a section"),
        ("selector.clip={reverse_kl: 0.5}", "this configuration has no selector.clip.reverse_kl: it comes with other "),
        ("selector.clip.reverse_kl=0.5", "choose one of them, or add it by +selector.clip.reverse_kl=0.5 where a sect"),
        ("learner.steps=3", "learner.steps is not a key; did you mean learner.num_steps?"),
        ("lerner=tiny", "lerner is not a key; did you mean learner?"),
        ("selector=entropi", "entropi is not an option of selector; did you mean selector=entropy?; there are ca_so"),
        ("selector=entropi", "first_n, full, grad_norm, "),
        ("experimet=smoke", "experimet is not a key; did you mean experiment?"),
        ("selector=soft_or,q3", "several values are a sweep: tip-exp -m selector=soft_or,q3"),
        ("eval.only=a,b", "tip-exp -m eval.only=a,b; one list is 'eval.only=[a,b]'"),
    ],
)
def test_a_typo_gets_the_nearest_name_in_one_line(typed: str, message: str) -> None:
    with pytest.raises(HydraException) as refused, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("config", overrides=[typed])
    told = unknown_name(refused.value)
    assert message in told and "\n" not in told and "struct" not in told


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("smoke", "'smoke' is neither a command nor key=value; did you mean experiment=smoke?"),
        ("comapre A B", "'comapre' is neither a command nor key=value; did you mean the command compare?"),
        ("seed=1 report", "'report' is neither a command nor key=value; did you mean the program tip-report?"),
        ("demo", "did you mean experiment=demo or `tip-exp -cd sweeps -cn demo`?"),
        ("seed", "did you mean seed=VALUE?"),
        ("?", "'?' is neither a command nor key=value; `tip-exp --help` lists both"),
        ("-m compare", "the command compare comes first: tip-exp compare …"),
        (".", ". is a folder; its runs are shown by `tip-exp show .`"),
        ("sweeps/table5.yaml", "sweeps/table5.yaml is a file; a sweep is started by `tip-exp -cd sweeps -cn table5`"),
        ("selector = soft_or", "key=value has no spaces: selector=soft_or"),
        ("selector= soft_or", "key=value has no spaces: selector=soft_or"),
        ("selector =soft_or", "key=value has no spaces: selector=soft_or"),
        ("--experiment smoke", "options are given as experiment=smoke; got --experiment"),
        ("--learner.lr=1", "options are given as learner.lr=1; got --learner.lr=1"),
        ("--selctr q3", "--selctr is not a flag; `tip-exp --help` lists all of them"),
        ("seed=1 -cn demo name=x", "name=x stands apart from the other key=value; write all of them together"),
        ("seed=1 ~logger +a=b -m -cd=sweeps --config-name demo", ""),
    ],
)
def test_words_that_are_no_overrides_get_what_was_meant(
    typed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = misread(typed.split(), [*cli.COMMANDS, *cli.PROBES])
    assert (message in told and "\n" not in told) if message else not told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--experiment smoke", "error: options are given as experiment=smoke; got --experiment\n"),
        ("-cn table5", "error: there is no config table5; did you mean `tip-exp -cd sweeps -cn table5`?\n"),
        ("-cd . -cn tow", "error: there is no config tow in .; did you mean `tip-exp -cd . -cn two`?\n"),
        ("-cd . -cn zzz", "error: there is no config zzz in .; there are two\n"),
        (
            "-m selector=full,entrpy",
            "error: no run of this sweep was started:\nselector=entrpy: entrpy is not an option of selector; did you m",
        ),
    ],
)
def test_a_mistyped_command_is_one_message(tmp_path: Path, arguments: str, message: str) -> None:
    write_sweep(tmp_path, "seed=1")
    line = [sys.executable, "-m", "tip_exp", *arguments.split()]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith(message)
    assert refused.stderr.count("\n") == (2 if "-m" in arguments else 1)


def test_other_errors_are_left_as_they_are() -> None:
    assert unknown_name(Exception("Could not override 'x.y'.\nMerge error")) == ""


def test_a_wrong_key_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    wrong = tip_exp(tmp_path / "x", "selector.retenton=0.5")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: selector.retenton is not a key; did you mean sel")
    rule = tip_exp(tmp_path / "x", "selector=full", "selector.retention=0.5")
    assert rule.returncode == 2 and rule.stderr.startswith("error: this configuration cannot run: selector.score=full")
    assert wrong.stderr.count("\n") == 1
    assert "Traceback" not in wrong.stderr + rule.stderr
    assert not list(tmp_path.iterdir())


def test_lengths_beyond_the_positions_are_refused_before_anything_runs(tmp_path: Path) -> None:
    """Not after the evaluation of the teacher, which takes minutes."""
    lengths = ["data.max_prompt_tokens=1024", "data.max_response_tokens=2048", "eval.max_tokens=2048"]
    refused = tip_exp(tmp_path / "x", *lengths, "eval.teacher=true")
    assert refused.returncode == 2
    expected = "data.max_prompt_tokens (1024) + data.max_response_tokens (2048) = 3072, but pair.teacher.path=package:"
    assert (
        expected in refused.stderr and "eval.max_tokens (2048) leaves no place for a prompt: pair.t" in refused.stderr
    )
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing"


@pytest.mark.parametrize("override", ["selector=null", "seed=" + "9" * 5000])
def test_what_hydra_itself_cannot_read_is_one_message(tmp_path: Path, override: str) -> None:
    result = tip_exp(tmp_path / "run", override)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr) < 700


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_broken_data_is_refused_before_anything_runs(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "my.jsonl").write_text('{"question": "1+1?", "answer": "2"}\nnot JSON\n')
    lengths = ["data.max_prompt_tokens=128", "data.max_response_tokens=72", "eval.max_tokens=72"]
    line = [sys.executable, "-m", "tip_exp", *flags, "data=jsonl", "data.train.file=my.jsonl", *lengths]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert refused.returncode != 0 and "my.jsonl, line 2: not JSON" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my.jsonl"]


def test_a_folder_of_something_else_is_refused_before_hydra_writes_into_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")
    line = [sys.executable, "-m", "tip_exp", "experiment=smoke", "hydra.run.dir=."]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert refused.returncode == 2 and "holds files that do not belong to a run" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_unforeseen_error_of_a_check_does_not_start_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would only warn of it."""

    def fail(_: Any) -> None:
        raise TypeError("unforeseen")

    monkeypatch.setattr("tip_exp.data.load.check_files", fail)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"hydra.run.dir={tmp_path}/run"], return_hydra_config=True)
    with pytest.raises(SystemExit) as ended:
        cli.RefuseEarly().on_run_start(config)
    assert ended.value.code == 1 and "TypeError: unforeseen" in capsys.readouterr().err


def test_an_unwritable_output_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = [sys.executable, "-m", "tip_exp", f"hydra.run.dir={tmp_path}/file/x"]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and f"{tmp_path}/file" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_leaves_its_files(finished: RunFolder) -> None:
    rows = read_rows(finished.metrics)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert 0 <= rows[0]["eval/word_sums/mean@2"] <= 1 and "eval/word_sums/greedy" in rows[-1]
    for name in ("train/loss", "select/kept_frac", "quadrant/q3_share", "time/rollout_s", "memory/process_peak_gib"):
        assert name in rows[5], name
    # floor(0.5 x length) of every rollout: slightly less than half
    assert all(0.47 < row["select/kept_frac"] <= 0.5 for row in rows[1:])
    evaluated = read_rows(finished.eval_rows)
    assert len(evaluated) == 2 * 32 * 3  # before and after, 32 problems, 2 samples and 1 greedy
    assert {"problem_id", "text", "answer", "extracted", "rule", "right", "truncated", "protocol"} <= evaluated[
        0
    ].keys()
    samples = read_rows(finished.samples)
    assert len(samples) == 4 and len(samples[0]["tokens"]) == len(samples[0]["entropy"]) == len(samples[0]["kept"])
    result = json.loads(finished.result.read_text())
    assert result["final"] == {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")}
    assert result["totals"]["kept_tokens"] == sum(row.get("select/kept_tokens", 0) for row in rows)
    card = (finished.model / "README.md").read_text()
    assert card.startswith("---\nbase_model: package:tiny/student") and "word_sums/greedy" in card
    assert {path.name for path in finished.checkpoints.iterdir()} == {f"step_{NUM_STEPS:05d}"}


def test_a_run_says_what_it_will_do_and_what_it_reached(finished: RunFolder) -> None:
    printed = finished.root.with_suffix(".txt").read_text().splitlines()
    assert printed[0].startswith("smoke.tiny.word_sums.soft_or.r50.s0: student package:tiny/student learns from ")
    assert printed[0].endswith(f" on word_sums, {NUM_STEPS} steps of 16 prompts x 1 response")
    assert printed[1].startswith("  soft_or keeps 50 % of the tokens; evaluates word_sums; ")
    assert printed[1].endswith("; writes whole")
    rows = [row["eval/word_sums/mean@2"] for row in read_rows(finished.metrics) if "eval/word_sums/mean@2" in row]
    change = f"word_sums/mean@2 {100 * rows[0]:.1f} % -> {100 * rows[-1]:.1f} %"
    assert printed[-1] == f"smoke.tiny.word_sums.soft_or.r50.s0: {change}; in whole; next: tip-report whole"


def test_the_same_command_skips_and_a_changed_config_is_refused(finished: RunFolder) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.root.rglob("*")}

    before = files()
    assert finished.root / ".hydra" / "overrides.yaml" in before
    again = tip_exp(finished.root)
    assert again.returncode == 0 and "already finished" in again.stdout
    changed = tip_exp(finished.root, "learner.lr=1e-3")
    assert changed.returncode == 2 and "learner.lr: 0.002 -> 0.001" in changed.stderr
    assert {path: time for path, time in files().items() if path != finished.root} == {
        path: time for path, time in before.items() if path != finished.root
    }, "the folder itself holds a lock for a moment"


def test_an_interrupt_of_the_launcher_alone_ends_its_run(tmp_path: Path) -> None:
    """`kill -INT`, as a service manager does; a terminal interrupts both."""
    process = start(command(tmp_path / "run", "learner.num_steps=5000"), tmp_path)
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes from the last checkpoint" in err and "Traceback" not in err
    assert not holder(RunFolder(tmp_path / "run").lock)


def test_killed_and_interrupted_runs_end_bit_for_bit_like_an_uninterrupted_one(
    finished: RunFolder, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "killed")
    killed = kill_at(folder.root, 3, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not folder.result.exists()
    wait_until_free(folder)
    terminated = kill_at(folder.root, 6, signal.SIGTERM)
    assert terminated.returncode == 143 and "Traceback" not in terminated.stderr
    assert terminated.stderr.endswith(
        f"\nterminated; the same command resumes from the last checkpoint in {folder.checkpoints}\n"
    )
    assert read_rows(folder.metrics)[-1]["step"] == max(numbered_checkpoints(folder.checkpoints))
    interrupted = kill_at(folder.root, 8, signal.SIGINT)
    assert interrupted.returncode == 130 and "resumes from the last checkpoint" in interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    saved = max(numbered_checkpoints(folder.checkpoints))
    done = tip_exp(folder.root)
    assert done.returncode == 0, done.stderr
    assert f": resumes after step {saved} of {NUM_STEPS}\n" in done.stdout
    assert [numbers(row) for row in read_rows(folder.metrics)] == [numbers(row) for row in read_rows(finished.metrics)]
    assert read_rows(folder.eval_rows) == read_rows(finished.eval_rows)
    assert read_rows(folder.samples) == read_rows(finished.samples)
    resumed, expected = (load_file(f.model / "model.safetensors") for f in (folder, finished))
    assert resumed.keys() == expected.keys() and all(resumed[name].equal(expected[name]) for name in expected)


def wait_until_free(folder: RunFolder) -> None:
    """Wait until the child has ended: a killed launcher's child holds the lock until then."""
    for _ in range(2000):
        if not holder(folder.lock):
            return
        time.sleep(0.02)
    raise AssertionError("the child outlived its launcher")


def test_a_background_run_ends_with_its_launcher(tmp_path: Path) -> None:
    """A shell starts a script's background jobs with SIGINT ignored, and their children inherit that."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(tmp_path / "run", "learner.num_steps=5000")]
    launcher = subprocess.Popen(ignoring, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(tmp_path / "run", 2, launcher)
    finally:
        launcher.terminate()
    assert launcher.wait(timeout=60) == 143
    wait_until_free(RunFolder(tmp_path / "run"))
    assert not RunFolder(tmp_path / "run").result.exists()


def test_a_run_starts_in_the_folder_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of Ray has another one, where relative paths of models would not be found."""

    def parse(_: Any) -> None:
        raise LookupError(os.getcwd())

    monkeypatch.chdir("/")
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(runtime=SimpleNamespace(cwd=str(tmp_path))))
    monkeypatch.setattr("tip_exp.config.parse.parse", parse)
    with pytest.raises(LookupError, match=f"^{tmp_path}$"):
        cli._run(OmegaConf.create())


def test_a_second_launch_names_the_process_that_holds_the_run(tmp_path: Path) -> None:
    folder, long = tmp_path / "held", "learner.num_steps=5000"
    first = subprocess.Popen(command(folder, long), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not RunFolder(folder).config.exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        second = tip_exp(folder, long)
        assert second.returncode == 1 and f"is held by process {first.pid} on " in second.stderr
    finally:
        first.kill()  # the kernel then sends SIGTERM to its child
        first.wait()
        wait_until_free(RunFolder(folder))


def write_sweep(folder: Path, *runs: str) -> list[str]:
    """Write two.yaml, a sweep of small runs; returns its command."""
    lines = "".join(f'      - "{run}"\n' for run in runs)
    (folder / "two.yaml").write_text(
        "# a sweep of small runs\n"
        "defaults: [config, override experiment: smoke, override logger: files, _self_]\n"
        "sweep: two\neval: {teacher: false}\n"
        f"hydra:\n  mode: MULTIRUN\n  sweeper:\n    runs:\n{lines}"
    )
    return [sys.executable, "-m", "tip_exp", "-cd", str(folder), "-cn", "two"]


def test_a_crash_stops_one_run_of_a_sweep_and_the_next_launch_repeats_it(tmp_path: Path) -> None:
    """Also: runs side by side leave the same numbers as one after another."""
    broken = tmp_path / "student"
    shutil.copytree(resolve_model("package:tiny/student"), broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:1000])
    small = "learner.num_steps=1 learner.warmup_steps=0 eval.greedy=false"
    line = write_sweep(tmp_path, f"{small} name=bad pair.student.path={broken}", f"{small} name=good")

    def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path)

    first = sweep("hydra.sweeper.jobs=2")
    runs = tmp_path / "outputs" / "sweeps" / "two"
    assert first.returncode == 1 and "error: bad: pair.student.path: cannot load" in first.stderr
    assert "Traceback" not in first.stderr and "Traceback" in RunFolder(runs / "bad").log.read_text()
    assert "2 runs, 2 at a time" in first.stdout and "it/s" not in first.stdout + first.stderr
    assert "step     1   word_sums" in RunFolder(runs / "good").log.read_text()
    assert (runs / "good" / "result.json").exists() and not (runs / "bad" / "result.json").exists()
    (broken / "model.safetensors").write_bytes(weights)
    second = sweep("hydra.sweeper.jobs=1")
    assert second.returncode == 0, second.stderr
    assert "1 of 2 runs are already finished" in second.stdout and "1 of 1  bad " in second.stdout
    assert "  bad  started, run 1 of 1\n" in second.stdout
    assert second.stdout.endswith("next: tip-report outputs/sweeps/two\n")
    assert "1/1" in second.stderr  # the progress bar
    alone, beside = (read_rows(RunFolder(runs / name).metrics) for name in ("bad", "good"))  # the same run but its name
    assert [numbers(row) for row in alone] == [numbers(row) for row in beside]


def test_an_interrupted_sweep_leaves_no_process(tmp_path: Path) -> None:
    line = write_sweep(tmp_path, *(f"learner.num_steps=1000 name={name}" for name in "abc"))
    sweep = start([*line, "hydra.sweeper.jobs=2"], tmp_path)
    runs = tmp_path / "outputs" / "sweeps" / "two"
    try:
        for name in "ab":
            wait_for_step(runs / name, 1, sweep)
        os.killpg(sweep.pid, signal.SIGINT)
        _, err = sweep.communicate(timeout=60)
    finally:
        sweep.kill()  # the kernel then ends the children
    assert sweep.returncode == 130 and "the same command resumes the sweep" in err and "Traceback" not in err
    for name in "ab":
        wait_until_free(RunFolder(runs / name))
        assert "terminated; the same command resumes" in RunFolder(runs / name).log.read_text()
    assert not (runs / "c").exists()


def test_a_sweep_with_one_wrong_run_starts_none(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tip_exp", "-m", "experiment=smoke", "selector.retention=0.5,7", "seed=1"]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert refused.returncode == 2 and "no run of this sweep was started" in refused.stderr
    assert "selector.retention=7" in refused.stderr
    assert not list(tmp_path.rglob("config.yaml"))
