"""Streamed sums against whole rows: any split of the vocabulary, any size of tile, logits of any height."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.losses import online_softmax as moments
from tip_exp.losses import tiling as tiles
from tip_exp.losses.tiling import GROUP, TILES_ALIVE, Workspace, tiling


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 5),
    vocab=st.integers(2, 30),
    cuts=st.lists(st.integers(1, 29), max_size=3),
    height=st.floats(-200, 200),
)
def test_moments_of_parts_merge_to_those_of_the_whole(
    seed: int, n: int, vocab: int, cuts: list[int], height: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    z, t = (5 * torch.randn(n, vocab, generator=g, dtype=torch.float64) + height for _ in range(2))
    edges = [0, *sorted({c for c in cuts if c < vocab}), vocab]
    work = Workspace(tiling(n, vocab, z.dtype, 1 << 20, whole_rows=True), z, z.dtype, spare=3)
    sums = None
    for start, stop in itertools.pairwise(edges):
        ours, theirs = moments.of_tile(z[:, start:stop], t[:, start:stop], work=work)
        assert theirs is not None
        sums = (ours, theirs) if sums is None else (sums[0].merged(ours), sums[1].merged(theirs))
    assert sums is not None
    known = moments.normalizers(*sums)
    p, q = z.softmax(-1), t.softmax(-1)
    expected = {
        "student": z.logsumexp(-1),
        "teacher": t.logsumexp(-1),
        "reverse_kl": (p * (p.log() - q.log())).sum(-1),
        "forward_kl": (q * (q.log() - p.log())).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(known, name), value, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(sums[0].entropy, -(p * p.log()).sum(-1), rtol=1e-9, atol=1e-9)


def test_a_peaked_row_keeps_its_digits_in_float32() -> None:
    """Logits near 1000: relative to the largest they are exact, so a KL of 1e-3 keeps three digits and more."""
    z = torch.tensor([[1000.0, 993.0, 990.0, 985.0]])
    t = torch.tensor([[1000.0, 995.0, 990.0, 985.0]])
    work = Workspace(tiling(1, 4, z.dtype, 1 << 10, whole_rows=True), z, z.dtype, spare=3)
    p, q = z.double().softmax(-1), t.double().softmax(-1)
    ours, theirs = moments.of_tile(z, t, work=work)
    assert theirs is not None
    assert float(ours.kl(theirs)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


@given(n=st.integers(1, 5000), vocab=st.integers(1, 200_000), kib=st.integers(1, 1 << 18), whole=st.booleans())
def test_tiles_stay_within_their_bytes_and_cover_everything_once(n: int, vocab: int, kib: int, whole: bool) -> None:
    cut = tiling(n, vocab, torch.float32, kib * 1024, whole_rows=whole)
    assert cut.area * 4 * TILES_ALIVE <= kib * 1024 or (cut.height == 1 and whole)
    assert cut.width == vocab or cut.width % GROUP == 0 or not whole
    for length, step in ((n, cut.height), (vocab, cut.width)):
        assert 1 <= step <= length
    if n <= 50:
        assert [i for rows in cut.rows() for i in range(rows.start, rows.stop)] == list(range(n))


def test_blocks_of_a_tile_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.BLOCK_ELEMENTS, "cpu", 20)
    work = Workspace(tiling(7, 9, torch.float32, 1 << 20, whole_rows=True), torch.zeros(1), torch.float32, spare=1)
    assert list(work.blocks(torch.zeros(7, 9))) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]  # 2 x 9 <= 20
