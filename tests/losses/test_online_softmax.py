"""Sums accumulated by tiles against whole rows: any split of the vocabulary, any tile size, large logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from tests.reference import random_logits
from torch import Tensor

from tip_exp.losses import tiling as tiling_module
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats, add_tile, tile_stats
from tip_exp.losses.tiling import LIVE_TILES, Workspace, tiling


def workspace_for(z: Tensor) -> Workspace:
    """One tile of all rows of z."""
    return Workspace(tiling(*z.shape, z.dtype, 1 << 20, whole_rows=True), z.dtype, z.device, num_scratch=4)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 5),
    vocab=st.integers(2, 30),
    split_at=st.lists(st.integers(1, 29), max_size=3),
    offset=st.floats(-200, 200),
)
def test_merged_sums_of_column_ranges_equal_those_of_whole_rows(
    seed: int, n: int, vocab: int, split_at: list[int], offset: float
) -> None:
    z, t = (logits + offset for logits in random_logits(seed, n, vocab))
    edges = [0, *sorted({column for column in split_at if column < vocab}), vocab]
    sums: list[OnlineSoftmaxStats] = []
    for start, stop in itertools.pairwise(edges):
        sums = add_tile(sums, [z[:, start:stop], t[:, start:stop]], workspace_for(z))
    log_normalizers = LogNormalizers.of(*sums)
    p, q = z.softmax(-1), t.softmax(-1)
    expected = {
        "student": z.logsumexp(-1),
        "teacher": t.logsumexp(-1),
        "reverse_kl": reference.divergence("reverse_kl", p, q),
        "forward_kl": reference.divergence("forward_kl", p, q),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(log_normalizers, name), value, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(sums[0].entropy, -(p * p.log()).sum(-1), rtol=1e-9, atol=1e-9)


def test_a_peaked_row_keeps_its_precision_in_float32() -> None:
    """Logits near 1000 are exact relative to the largest, so a KL of 1e-3 keeps three digits or more."""
    z = torch.tensor([[1000.0, 993.0, 990.0, 985.0]])
    t = torch.tensor([[1000.0, 995.0, 990.0, 985.0]])
    student, teacher = tile_stats([z, t], workspace_for(z))
    expected = reference.divergence("reverse_kl", z.double().softmax(-1), t.double().softmax(-1))
    assert float(student.kl(teacher)) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@given(n=st.integers(1, 5000), vocab=st.integers(1, 200_000), kib=st.integers(1, 1 << 18), whole_rows=st.booleans())
def test_tiles_stay_within_their_bytes_and_cover_everything_once(
    device: str, n: int, vocab: int, kib: int, whole_rows: bool
) -> None:
    cut = tiling(n, vocab, torch.float32, kib * 1024, whole_rows=whole_rows, device=device)
    assert cut.held_elements * 4 * LIVE_TILES <= kib * 1024 or (cut.height == 1 and whole_rows)
    assert cut.width == vocab or not whole_rows
    for slices, length in ((cut.rows(), n), (cut.columns(), vocab)):
        edges = [(part.start, part.stop) for part in itertools.islice(slices, 1000)]
        assert edges[0][0] == 0 and all(start < stop for start, stop in edges)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(edges))
        assert len(edges) == 1000 or edges[-1][1] == length


@pytest.mark.parametrize(
    "num_rows, mib, whole_rows, shape",
    [
        (5000, 256, True, (128, 151_936)),  # 2^25 logits a model: 220 rows
        (5000, 64, True, (55, 151_936)),  # 55 rows are fewer than 128
        (100, 256, True, (100, 151_936)),  # all rows
        (5000, 256, False, (1024, 32_768)),
        (5000, 3, False, (512, 768)),  # 393,216 logits: 627 rows
    ],
)
def test_cuda_tiles_are_multiples_of_128(num_rows: int, mib: int, whole_rows: bool, shape: tuple[int, int]) -> None:
    cut = tiling(num_rows, 151_936, torch.float32, mib << 20, whole_rows=whole_rows, device="cuda")
    assert (cut.height, cut.width) == shape


def test_blocks_of_a_tile_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiling_module.BLOCK_ELEMENTS, "cpu", 20)
    tile = torch.zeros(7, 9)
    blocks = list(workspace_for(tile).blocks(tile))
    assert blocks == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]  # 2 x 9 <= 20
