"""The cache gives back what it got, bit for bit, from memory or from a file that has no name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tip_exp.learner.teacher_cache import TeacherCache

MIB = 2**20


def states(*rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(n, 8).to(dtype) for n in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limit", [0, 200, 10_000])
def test_what_comes_back_is_what_was_put_in(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    given = states(3, 0, 5, 700, dtype=dtype)
    cache = TeacherCache(limit, tmp_path)
    for hidden in given:
        cache.append(hidden)
    assert len(cache) == 4 and all(a.equal(b) and a.dtype == dtype for a, b in zip(cache, given, strict=True))
    assert cache[2].equal(given[2])


def test_only_what_is_above_the_limit_goes_to_the_file(tmp_path: Path) -> None:
    """Rows of 8 x 4 = 32 bytes; 320 fit beside nothing, then 96 do not, then 64 beside 320 do: 320 + 64 <= 390."""
    cache = TeacherCache(390, tmp_path)
    for hidden in states(10, 3, 2):
        cache.append(hidden)
    assert (cache.num_bytes, cache.spilled_bytes) == (480, 96)
    assert list(tmp_path.iterdir()) == []  # a crash leaves nothing, for there is nothing to see
    found = cache.metrics(vocab_size=100)
    assert found["memory/teacher_cache_bytes_per_token"] == 32 and found["memory/teacher_logits_bytes_per_token"] == 400
    assert found["memory/teacher_cache_spilled_mib"] == 96 / MIB


def test_a_spilled_cache_is_not_in_anonymous_memory(tmp_path: Path) -> None:
    """The kernel can write a file's pages out; /proc tells them apart from what it cannot."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    one, before = torch.ones(2 * MIB, 8), anonymous()  # 64 MiB
    cache = TeacherCache(0, tmp_path)
    cache.append(one)
    cache.append(one)
    assert anonymous() - before < 8 * 1024 and cache[1].equal(one)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TeacherCache(0, tmp_path / "nowhere").append(torch.ones(1, 1))
