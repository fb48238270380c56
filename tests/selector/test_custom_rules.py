"""Rules outside of the package: import paths and entry points, their errors, and runs that know the rule's code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.report.test_page import page_of, sample
from tests.synthetic_runs import append_rows, finish, write_config
from torch import Tensor

from tip_exp.config.parse import differences, digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.launch.launch import State, changes, state_of
from tip_exp.launch.reuse import find_duplicate, finished_digests
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import summarize
from tip_exp.report.overlaps import overlaps
from tip_exp.report.overview import overview
from tip_exp.selector.lookup import find_rule, named_rule, required_stats
from tip_exp.selector.scores import INPUTS
from tip_exp.utils.errors import ConfigError

Compose = Callable[..., RunConfig]
RULE = "def certain(jsd, teacher_entropy):\n    return jsd * (1 - teacher_entropy)\n"
SELECTOR = ("selector=rule", "selector.score=my_rules:certain")


def write_rule(source: str, module: str = "my_rules") -> None:
    """Write a module into the working directory, as an edit between two commands: nothing of the old one is left."""
    Path(f"{module}.py").write_text(source)
    sys.modules.pop(module, None)
    named_rule.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a rule; sys.path is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second would share their cached code
    write_rule(RULE)
    yield tmp_path
    sys.modules.pop("my_rules", None)
    named_rule.cache_clear()


def test_a_rule_of_the_working_directory_is_a_selector(compose_run: Compose) -> None:
    config = compose_run(*SELECTOR, "selector.retention=0.2", "+selector.clip.jsd=0.98")
    assert config.selector.label == "certain" and config.name == "tiny.word_sums.certain.r20.s0"
    assert config.selector.score.startswith("my_rules:certain@")
    assert required_stats(config.selector.score) == {"jsd", "teacher_entropy"}
    with pytest.raises(ConfigError, match="my_rules:certain does not read entropy"):
        compose_run(*SELECTOR, "+selector.clip.entropy=0.98")


def test_an_installed_package_can_name_a_rule(folder: Path, compose_run: Compose) -> None:
    metadata = folder / "certain_rules-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: certain-rules\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[tip_exp.selector_scores]\nsure = my_rules:certain\n")
    sys.path.insert(0, str(folder))
    config = compose_run("selector=rule", "selector.score=sure")
    assert config.selector.label == "sure" and config.selector.score.startswith("sure@")
    assert find_rule(config.selector.score) is find_rule("my_rules:certain")
    with pytest.raises(ConfigError, match=r"did you mean sure\?"):
        compose_run("selector=rule", "selector.score=surely")


# case -> (source of my_rules.py, score, part of the message)
BAD = {
    "module": (RULE, "my_rulse:certain", "cannot import the module my_rulse of my_rulse:certain: it is neither in /"),
    "function": (RULE, "my_rules:certian", "the module my_rules has no function of the name 'certian'"),
    "no function": ("certain = 3", "my_rules:certain", "the module my_rules has no function of the name 'certain'"),
    "statistic": (
        "def certain(entropi): ...",
        "my_rules:certain",
        "the rule certain has the parameter entropi, which is no statistic; parameters can be entropy, ",
    ),
    "its import": ("import nothing_such", "my_rules:certain", "ModuleNotFoundError: No module named 'nothing_such'"),
    "its syntax": ("def certain(", "my_rules:certain", "SyntaxError: "),
    "its exit": ("import sys\nsys.exit(3)", "my_rules:certain", "SystemExit: 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_rule_that_cannot_be_used_is_refused(case: str, compose_run: Compose) -> None:
    source, score, message = BAD[case]
    write_rule(source)
    with pytest.raises(ConfigError) as caught:
        compose_run("selector=rule", f"selector.score={score}")
    assert str(caught.value).startswith("this configuration cannot run: selector.score: ")
    assert message in str(caught.value)


# case -> (body of the rule certain, part of the message)
BROKEN = {
    "raises": (
        "x = jsd\n    return undefined_name",
        "the rule my_rules:certain, line 3: NameError: name 'undefined_name'",
    ),
    "exits": ("raise SystemExit(4)", "the rule my_rules:certain, line 2: SystemExit: 4"),
    "None": ("pass", "the rule my_rules:certain returned NoneType, not a score for each of 64 tokens"),
    "list": ("return jsd.tolist()", "the rule my_rules:certain returned list, not a score"),
    "shape": ("return jsd[:, None]", "the rule my_rules:certain returned (64, 1), not a score"),
    "NaN": ("return jsd * jsd.log()", "the rule my_rules:certain returned NaN at 1 of 64 tokens, first at rollout "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_refused_before_the_run(case: str, compose_run: Compose) -> None:
    body, message = BROKEN[case]
    write_rule(f"def certain(jsd):\n    {body}\n")
    with pytest.raises(ConfigError, match=re.escape(f"selector.score: tried on random tokens, {message}")):
        compose_run(*SELECTOR)


def test_the_random_tokens_of_the_trial_have_every_input(compose_run: Compose) -> None:
    checks = "assert (student_logprob <= 0).all() and (jsd <= 0.694).all() and (reverse_kl >= 0).all()"
    write_rule(
        f"def certain({', '.join(INPUTS)}, *, alpha):\n    {checks}\n    return alpha * (entropy + ier).sqrt()\n"
    )
    assert compose_run(*SELECTOR, "selector.normalizer=none", "+selector.parameters.alpha=2")


def test_an_infinite_score_is_no_weight(compose_run: Compose) -> None:
    write_rule("def certain(jsd):\n    return 1 / (0 * jsd.abs())\n")
    assert compose_run(*SELECTOR)  # it ranks
    with pytest.raises(ConfigError, match="the rule my_rules:certain returned infinity at 64 of 64 tokens"):
        compose_run(*SELECTOR, "selector.weight=score")


def test_a_rule_need_not_be_hashable() -> None:
    @dataclass
    class Above:
        nats: float

        def __call__(self, entropy: Tensor) -> Tensor:
            return entropy - self.nats

    assert required_stats(Above(1.0)) == {"entropy"}


def test_a_rule_does_not_run_under_the_name_of_another(compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"selector.label=soft_or would name .* choose selector=rule"):
        compose_run("selector.score=my_rules:certain", "selector.clip={}")


def test_a_rule_may_mark_tokens_instead_of_ranking_them(compose_run: Compose) -> None:
    assert compose_run(*SELECTOR, "selector.order=positive", "selector.retention=1.0")
    with pytest.raises(ConfigError, match=r"keeps every token whose score is positive, .*selector\.retention is 0\.5"):
        compose_run(*SELECTOR, "selector.order=positive")


def test_an_edited_rule_is_another_config(folder: Path, compose_run: Compose) -> None:
    """The run under its name is refused, and the run of the old code is not linked under another name."""
    before, run = compose_run(*SELECTOR), RunFolder(folder / "outputs" / "run")
    write_config(before, run.root)
    finish(before, run.root, 0.5)
    assert state_of(before, run) is State.DONE
    write_rule(RULE.replace("1 -", "2 -"))
    after = compose_run(*SELECTOR)
    assert digest(after) != digest(before)
    assert state_of(after, run) is State.CHANGED
    assert changes(after, run) == [f"selector.score: {before.selector.score} -> {after.selector.score}"]
    finished = finished_digests(folder / "outputs")
    assert find_duplicate(before, RunFolder(folder / "x"), finished)
    assert not find_duplicate(after, RunFolder(folder / "x"), finished)
    write_rule(RULE)
    assert compose_run(*SELECTOR) == before and state_of(before, run) is State.DONE


def test_a_rule_cannot_change_between_a_command_and_its_process(folder: Path, compose_run: Compose) -> None:
    """The process of a run reads the config that the command wrote; so does a run that is repeated from its config."""
    config = compose_run(*SELECTOR)
    assert find_rule(config.selector.score)
    write_rule(RULE + "# another comment\n")
    with pytest.raises(
        ValueError,
        match=r"the code of my_rules:certain is not that of this run: its digest is \w{12}, the run's \w{12}\.",
    ):
        find_rule(config.selector.score)
    with pytest.raises(ConfigError, match="the code of my_rules:certain is not that of this run"):
        compose_run("selector=rule", f"selector.score='{config.selector.score}'")


def test_a_finished_run_is_reported_when_its_rule_is_gone(folder: Path, compose_run: Compose) -> None:
    runs = [compose_run(*SELECTOR), compose_run("selector=full"), compose_run("selector=entropy")]
    for config in runs:
        write_config(config, folder / "outputs" / config.selector.label)
        finish(config, folder / "outputs" / config.selector.label, 0.5)
        append_rows(folder / "outputs" / config.selector.label / "samples.jsonl", [sample(20, [True, False] * 4)])
    arms = {config.selector.label: config.model_dump() for config in runs}
    assert list(overlaps([sample(20, [True])], arms).kept) == ["certain", "full", "entropy"]
    assert page_of(folder / "outputs")
    Path("my_rules.py").unlink()
    sys.modules.pop("my_rules", None)
    named_rule.cache_clear()
    assert load(folder / "outputs" / "certain" / "config.yaml") == runs[0]
    assert [line.split(":")[0] for line in differences(runs[2], runs[0])] == ["selector.label", "selector.score"]
    rows = overview(summarize(read_runs([folder / "outputs"]))).rows
    assert [row[0] for row in rows] == ["certain", "entropy", "full"]
    assert list(overlaps([sample(20, [True])], arms).kept) == ["full", "entropy"]
    assert page_of(folder / "outputs")


@pytest.mark.slow
def test_a_run_with_a_rule_of_the_working_directory(folder: Path) -> None:
    """`tip-exp` itself, which has no working directory on its path, and the process of its run."""
    line = [str(Path(sys.executable).with_name("tip-exp")), *SELECTOR, "experiment=smoke", "logger=files"]
    line += ["learner.num_steps=2", "learner.warmup_steps=0", "eval.teacher=false", "num_threads=1"]

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=300)

    first, again = command(), command()
    assert first.returncode == 0, first.stderr
    assert "already finished" in again.stdout
    (run,) = (folder / "outputs" / "runs").iterdir()
    assert run.name == "smoke.tiny.word_sums.certain.r50.s0"
    score = OmegaConf.load(run / "config.yaml").selector.score
    Path("my_rules.py").write_text(RULE.replace("1 -", "2 -"))
    edited = command()
    assert edited.returncode == 2
    assert f"another config: selector.score: {score} -> my_rules:certain@" in edited.stderr
