"""Checkpoints survive what happens to disks: torn files, full disks, crashes between two writes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tip_exp.learner import checkpoint
from tip_exp.learner.checkpoint import CheckpointError
from tip_exp.models.pair import Pair


def save(folder: Path, pair: Pair, step: int) -> None:
    checkpoint.save(folder, step, pair.student.module, pair.tokenizer, {"step": step})


def test_the_newest_two_are_kept(tmp_path: Path, tiny_pair: Pair) -> None:
    for step in (1, 2, 3):
        save(tmp_path, tiny_pair, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00002", "step_00003"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 3 and found.learner_state() == {"step": 3}


def test_a_checkpoint_is_a_plain_model_folder(tmp_path: Path, tiny_pair: Pair) -> None:
    save(tmp_path, tiny_pair, 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "step_00001").state_dict()
    for name, value in tiny_pair.student.module.state_dict().items():
        assert value.equal(again[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "step_00001").chat_template == tiny_pair.tokenizer.chat_template


@pytest.mark.parametrize("victim", ["model.safetensors", "learner.pt", "checksums.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, tiny_pair: Pair, victim: str, damage: str
) -> None:
    for step in (1, 2):
        save(tmp_path, tiny_pair, step)
    path = tmp_path / "step_00002" / victim
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        half = len(data) // 2
        path.write_bytes(data[:half] if damage == "cut" else data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1


def test_no_whole_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "step_00001").mkdir()
    assert checkpoint.newest(tmp_path) is None


def test_a_disk_that_takes_no_more_is_one_error_and_the_old_checkpoint_stands(tmp_path: Path, tiny_pair: Pair) -> None:
    """The kernel's file-size limit fails the write in the middle of the weights, as a full disk does."""
    save(tmp_path, tiny_pair, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="the checkpoint of step 2 could not be written to"):
            save(tmp_path, tiny_pair, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00001"]


def test_what_a_crash_left_half_written_is_overwritten(tmp_path: Path, tiny_pair: Pair) -> None:
    (tmp_path / ".writing_00001").mkdir()
    (tmp_path / ".writing_00001" / "old").write_text("half")
    save(tmp_path, tiny_pair, 1)
    assert not (tmp_path / "step_00001" / "old").exists()
