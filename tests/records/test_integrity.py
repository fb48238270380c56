"""A changed bit in the files of a finished run is noticed, and what to do loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.launch import reuse
from tip_exp.launch.launch import State, launch, state_of
from tip_exp.launch.push import card
from tip_exp.launch.reuse import check_models, find_duplicate, finished_digests, link_from
from tip_exp.launch.show import show
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_all, read_run
from tip_exp.records.result import write_result
from tip_exp.utils.errors import ConfigError, DataError, RunFailedError

FILES = ["config.yaml", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "result.json", "model/a.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, tiny_config: RunConfig, write_config: Callable[[RunConfig, Path], None]) -> RunFolder:
    """A finished run, whose files are a minute old."""
    folder = RunFolder(tmp_path / "runs" / "a")
    write_config(tiny_config, folder.root)
    append_rows(folder.metrics, [{"step": step, "train/loss": 0.5} for step in range(3)])
    append_rows(folder.samples, [{"step": 1, "tokens": ["x"], "kept": [True]}])
    scores = {"step": 0, "model": "student", "benchmark": "b", "protocol": "sampled", "problem_id": "p", "right": 1.0}
    append_rows(folder.eval_rows, [scores])
    folder.model.mkdir()
    (folder.model / "a.safetensors").write_bytes(bytes(1000))
    write_result(tiny_config, folder, {}, {}, "a CPU")
    for path in folder.root.rglob("*"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    return folder


def flip(path: Path, *, keep_time: bool = False) -> None:
    """Change one bit of a digit, or of the byte in the middle, so that JSON and YAML stay whole."""
    content, status = bytearray(path.read_bytes()), path.stat()
    digits = [at for at, byte in enumerate(content) if chr(byte) in "2345"]
    at = digits[-1] if digits else len(content) // 2
    content[at] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_is_damage_for_launch_and_report(folder: RunFolder, tiny_config: RunConfig, name: str) -> None:
    assert state_of(tiny_config, folder) is State.DONE
    assert [record.damage for record in read_all([folder.root.parent])] == [""]
    flip(folder.root / name)
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    assert state_of(tiny_config, folder) is State.DAMAGED
    own = "own SHA-256" if name == "result.json" else "SHA-256 in result.json"
    with pytest.raises(RunFailedError, match=rf"{name} does not agree with its {own}. Restore the file") as error:
        launch(tiny_config, folder)
    assert len(str(error.value)) < 600 and "remove" not in str(error.value)
    for root in (folder.root.parent, folder.root):  # with an index and without
        (record,) = read_all([root])
        assert record.damage.startswith(name) and record.result is None
    folder.lock.unlink(missing_ok=True)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "samples.jsonl"])
def test_rows_of_equal_size_and_time_are_read(folder: RunFolder, tiny_config: RunConfig, name: str) -> None:
    flip(folder.root / name, keep_time=True)
    assert state_of(tiny_config, folder) is State.DAMAGED
    assert read_all([folder.root.parent])[0].damage.startswith(name)


def test_a_restored_file_is_no_damage(folder: RunFolder) -> None:
    content = folder.eval_rows.read_bytes()
    flip(folder.eval_rows)
    assert read_all([folder.root.parent])[0].damage
    folder.eval_rows.write_bytes(content)
    assert not read_all([folder.root.parent])[0].damage


def test_a_model_is_read_where_it_is_used(
    folder: RunFolder, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = tiny_config.pair
    student = pair.student.model_copy(update={"path": str(folder.model)})
    user = tiny_config.model_copy(update={"pair": pair.model_copy(update={"student": student})})
    check_models(user)
    flip(folder.model / "a.safetensors", keep_time=True)
    assert state_of(tiny_config, folder) is State.DONE  # the size is the same: a launch does not read gigabytes
    for use, error in ((lambda: check_models(user), ConfigError), (lambda: card(folder), DataError)):
        with pytest.raises(error, match=r"model/a.safetensors does not agree.* Restore the file"):
            use()
    show([str(folder.root)])
    show([str(folder.root), "--verify"])
    lines = capsys.readouterr().out.splitlines()
    assert "state: done" in lines
    assert "state: damaged: model/a.safetensors does not agree with its SHA-256 in result.json" in lines


def test_what_a_user_may_do_is_no_damage(folder: RunFolder, tiny_config: RunConfig) -> None:
    folder.card.write_text("a card of their own")
    assert read_run(folder, "all").result
    for path in folder.model.iterdir():
        path.unlink()
    assert state_of(tiny_config, folder) is State.DAMAGED
    folder.model.rmdir()
    assert state_of(tiny_config, folder) is State.DONE  # a model takes most of a run's space


def test_the_remedy_keeps_rows(folder: RunFolder, tiny_config: RunConfig) -> None:
    """Without a checkpoint a launch would start again and drop them."""
    with_checkpoint = "rename result.json: the same command writes it and model/ again, from the newest checkpoint"
    for checkpoint, name, remedy in (
        (False, "model/a.safetensors", "move the folder away: the same command runs it again"),
        (True, "model/a.safetensors", with_checkpoint),
        (True, "eval.jsonl", "move the folder away: the same command runs it again"),
    ):
        if checkpoint:
            (folder.checkpoints / "step_00002").mkdir(parents=True, exist_ok=True)
        flip(folder.root / name)
        with pytest.raises(RunFailedError, match=remedy):
            launch(tiny_config, folder)
        flip(folder.root / name)


def test_a_result_without_hashes_is_read(folder: RunFolder, tiny_config: RunConfig) -> None:
    """Of an older version."""
    result = json.loads(folder.result.read_text())
    folder.result.write_text(json.dumps({key: result[key] for key in result.keys() - {"files", "sha256"}}))
    assert state_of(tiny_config, folder) is State.DONE and read_run(folder, "all").result


def test_a_result_without_its_own_hash_is_damaged(folder: RunFolder, tiny_config: RunConfig) -> None:
    result = json.loads(folder.result.read_text())
    folder.result.write_text(json.dumps({key: result[key] for key in result.keys() - {"sha256"}}))
    assert state_of(tiny_config, folder) is State.DAMAGED


def test_a_link_is_whole_and_damaged_rows_are_not_linked(folder: RunFolder, tiny_config: RunConfig) -> None:
    link = RunFolder(folder.root.with_name("b"))
    link.root.mkdir()
    link.config.write_bytes(folder.config.read_bytes())
    outputs = folder.root.parent
    assert find_duplicate(tiny_config, link, finished_digests(outputs)) == folder
    link_from(folder, tiny_config, link)
    assert read_run(link, "all").result and state_of(tiny_config, link) is State.DONE
    flip(folder.eval_rows, keep_time=True)  # both folders have these rows
    link.result.unlink()
    assert find_duplicate(tiny_config, link, finished_digests(outputs)) is None


def test_a_run_whose_model_has_changed_since_is_not_linked(
    folder: RunFolder, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, other = finished_digests(folder.root.parent), RunFolder(folder.root.with_name("b"))
    assert find_duplicate(tiny_config, other, finished) == folder
    monkeypatch.setattr(reuse, "changed_models", lambda *_: ["pair.student.path=outputs/student"])
    assert find_duplicate(tiny_config, other, finished) is None


def test_a_changed_bit_in_the_index_is_read_over(folder: RunFolder) -> None:
    index = folder.root.parent / ".tip_index.jsonl"
    records = read_all([folder.root.parent])
    content = index.read_text()
    changed = content.replace('"steps": 2', '"steps": 3')
    for text in (changed, content.replace("step", "stop")):
        assert text != content
        index.write_text(text)
        assert read_all([folder.root.parent]) == records and index.read_text() == content


def test_a_run_that_starts_again_during_a_read_is_not_damaged(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that has result.json, and then rows of the next launch, reads again."""
    from tip_exp.records import reader

    check = reader.damage

    def restarts_before(run: RunFolder, *rest: object) -> str:
        run.result.unlink()
        run.metrics.write_bytes(b"")
        return check(run, *rest)

    monkeypatch.setattr(reader, "damage", restarts_before)
    assert read_run(folder).result is None
