"""Run folders are found and read once; the index detects changes."""

from __future__ import annotations

import errno
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records import reader
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import INDEX, find_runs, read_all, read_runs, write_archive
from tip_exp.report.arms import summarize
from tip_exp.report.overview import csv_text
from tip_exp.utils.errors import DataError


@pytest.fixture
def runs(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    """full and seeds 0 and 1 of soft_or are finished, seed 2 is not."""
    overrides = {"full": "selector=full", "soft0": "seed=0", "soft1": "seed=1", "soft2": "seed=2"}
    for name, override in overrides.items():
        config = compose_run(override)
        write_config(config, tmp_path / name)
        if name != "soft2":
            finish(config, tmp_path / name, 0.8)
    return tmp_path


def read_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that read_runs([root]) reads from their own files and not from the index."""
    names: list[str] = []
    read_run = reader.read_run

    def recording(folder: RunFolder) -> reader.RunRecord:
        names.append(folder.root.name)
        return read_run(folder)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_run", recording)
        read_runs([root])
    return names


def test_only_changed_runs_are_read_again(
    runs: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_names(runs, monkeypatch) == ["full", "soft0", "soft1", "soft2"]
    written = (runs / INDEX).stat().st_mtime_ns
    assert read_names(runs, monkeypatch) == [] and (runs / INDEX).stat().st_mtime_ns == written
    finish(compose_run("seed=2"), runs / "soft2", 0.9)
    (runs / "full" / "result.json").unlink()
    write_config(compose_run("selector=entropy"), runs / "new")
    assert read_names(runs, monkeypatch) == ["full", "new", "soft2"]
    assert [(Path(record.folder).name, record.is_done) for record in read_runs([runs])] == [
        ("full", False), ("new", False), ("soft0", True), ("soft1", True), ("soft2", True),
    ]  # fmt: skip


def test_records_from_the_index_equal_those_from_the_files(runs: Path) -> None:
    from_files = read_runs([runs])
    assert from_files[1].outcomes["word_sums"]["samples"] == 4
    assert read_runs([runs]) == from_files


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: "torn\n" + text, lambda text: '{"a": 1}\n'])
def test_a_damaged_index_is_replaced(runs: Path, damage: Callable[[str], str]) -> None:
    records = read_runs([runs])
    index = (runs / INDEX).read_text()
    (runs / INDEX).write_text(damage(index))
    assert read_runs([runs]) == records
    assert (runs / INDEX).read_text() == index


def test_a_full_disk_costs_the_index_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reader, "write_atomic", full)
    assert len(read_runs([runs])) == 4 and not (runs / INDEX).exists()


def test_a_renamed_run_is_read_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_runs([runs])
    (runs / "full").rename(runs / "fulm")  # as many runs, in the same order, with the same times
    assert read_names(runs, monkeypatch) == ["fulm"]
    assert read_names(runs, monkeypatch) == []


def test_runs_and_their_index_can_be_moved(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_runs([runs])
    moved = runs.rename(runs.with_name("moved"))
    assert read_names(moved, monkeypatch) == []
    assert {Path(record.folder).parent for record in read_runs([moved])} == {moved}


def test_no_run_of_an_archive_is_lost_or_counted_twice(
    runs: Path, tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    records = [record for record in read_runs([runs]) if record.is_done]
    other = tmp_path / "other" / Path(records[0].folder).name  # another sweep's run, with the same folder name
    config = compose_run("learner.lr=0.009")
    write_config(config, other)
    finish(config, other, 0.5)
    archive = tmp_path / "all.runs.gz"
    write_archive(archive, [*records, *read_runs([other.parent])])
    archived = read_runs([archive])
    assert sorted(record.config["learner"]["lr"] for record in archived)[-1] == 0.009
    assert len(archived) == len(records) + 1 and len({record.folder for record in archived}) == len(archived)
    assert sum(record.is_done for record in read_runs([archive, runs])) == len(records) + 1
    write_archive(archive, archived)
    assert len(read_runs([archive])) == len(archived)


def test_an_archive_holds_what_tables_need(runs: Path, tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    records = read_runs([runs])
    write_archive(tmp_path / "some.runs.gz", records[:2])
    archived = read_runs([tmp_path / "some.runs.gz"])
    assert [record.folder for record in archived] == [f"{tmp_path}/some.runs.gz/{name}" for name in ("full", "soft0")]
    assert [record.config for record in archived] == [record.config for record in records[:2]]
    assert [record.outcomes for record in archived] == [record.outcomes for record in records[:2]]
    together = summarize(read_all([tmp_path / "some.runs.gz", runs / "soft1"]))
    finished = summarize([record for record in records if record.is_done])
    assert sorted(csv_text(together).splitlines()) == sorted(csv_text(finished).splitlines())
    whole = (tmp_path / "some.runs.gz").read_bytes()
    for torn in (whole[:-9], whole[:200], b"", b"{}", gzip.compress(b"{}\n{}\n"), gzip.compress(b"\xff")):
        (tmp_path / "some.runs.gz").write_bytes(torn)
        with pytest.raises(DataError, match=r"some\.runs\.gz is no whole archive of runs"):
            read_all([tmp_path / "some.runs.gz"])


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["a.r2.s0", "a.r5.s2", "a.r5.s10", "a.r20.s01", "a.r20.s1", "b.r1.s0"]
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert [run.root.name for run in find_runs([tmp_path])] == names
    assert [Path(record.folder).name for record in read_all([tmp_path])] == names


def test_folders_inside_a_run_are_not_runs(runs: Path) -> None:
    for inner in (".hydra", "checkpoint/step_00080"):
        (runs / "full" / inner).mkdir(parents=True)
        (runs / "full" / inner / "config.yaml").write_text("")
    assert [folder.root.name for folder in find_runs([runs, runs / "full"])] == ["full", "soft0", "soft1", "soft2"]


def test_a_result_that_is_removed_while_it_is_read_is_no_damage(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of a changed teacher removes result.json, at any moment."""
    (runs / "full" / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: True)  # it was there a moment ago
        assert reader.read_run(RunFolder(runs / "full")).result is None
