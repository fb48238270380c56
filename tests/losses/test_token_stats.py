"""Statistics of tokens against float64 sums written out here; tiles and dtypes change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tip_exp.losses import tiling as tiles
from tip_exp.losses.head import Head
from tip_exp.losses.tiling import TILES_ALIVE
from tip_exp.losses.token_stats import Statistics, measure, normalized_entropy
from tip_exp.selector.scores import STATISTICS, STUDENT_STATISTICS

ALL = frozenset(STATISTICS)


def score_tokens(*args: Any, **settings: Any) -> Statistics:
    return measure(*args, **settings).statistics


def world(
    seed: int, n: int, vocab: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Head, Head]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return (
        draw(n, 6),
        draw(n, 9),
        torch.randint(vocab, (n,), generator=g),
        Head(draw(vocab, 6), vocab),
        Head(draw(vocab, 9), vocab),
    )


def naive(
    hidden: Tensor, other: Tensor, ids: Tensor, head: Head, teacher_head: Head, beta: float, k: int
) -> dict[str, Tensor]:
    p = (hidden.double() @ head.weight.double().T).softmax(-1)
    q = (other.double() @ teacher_head.weight.double().T).softmax(-1)
    m = beta * q + (1 - beta) * p
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    rows = torch.arange(len(ids))
    overlap = [
        len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())) / k for a, b in zip(p, q, strict=True)
    ]
    return {
        "entropy": -(p * p.log()).sum(-1),
        "teacher_entropy": -(q * q.log()).sum(-1),
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m),
        "student_logprob": p[rows, ids].log(),
        "teacher_logprob": q[rows, ids].log(),
        "topk_overlap": torch.tensor(overlap, dtype=torch.float64),
    }


@given(seed=st.integers(0, 1000), n=st.integers(1, 9), vocab=st.integers(4, 30), tile_rows=st.integers(1, 5))
def test_every_statistic_equals_its_naive_sum_whatever_the_tiles(seed: int, n: int, vocab: int, tile_rows: int) -> None:
    hidden, other, ids, head, teacher_head = world(seed, n, vocab)
    tile_bytes = tile_rows * TILES_ALIVE * vocab * 8
    found = score_tokens(
        hidden, other, ids, head, teacher_head, wanted=ALL, tile_bytes=tile_bytes, jsd_beta=0.3, top_k=3
    )
    expected = naive(hidden, other, ids, head, teacher_head, 0.3, 3)
    assert found.keys() == expected.keys()
    for name in STATISTICS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@given(seed=st.integers(0, 1000), vocab=st.integers(100, 700), at_once=st.integers(1, 1500), rows=st.integers(1, 7))
def test_whole_rows_may_be_several_products(seed: int, vocab: int, at_once: int, rows: int) -> None:
    hidden, other, ids, head, teacher_head = world(seed, 5, vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.PRODUCT_ELEMENTS, "cpu", at_once)
        patch.setitem(tiles.BLOCK_ELEMENTS, "cpu", at_once // 2 + 1)
        found = score_tokens(
            hidden, other, ids, head, teacher_head, wanted=ALL, tile_bytes=rows * TILES_ALIVE * vocab * 8, top_k=20
        )
    expected = naive(hidden, other, ids, head, teacher_head, 0.5, 20)
    for name in STATISTICS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_low_precision_weights_are_accumulated_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    hidden, other, ids, head, teacher_head = world(0, 40, 50, dtype)
    found = score_tokens(hidden, other, ids, head, teacher_head, wanted=ALL, tile_bytes=10_000)
    expected = naive(hidden, other, ids, head, teacher_head, 0.5, 10)
    for name in STATISTICS:
        assert found[name].dtype == torch.float32
        if name != "topk_overlap":
            torch.testing.assert_close(found[name].double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_student_statistics_never_project_the_teacher() -> None:
    hidden, other, ids, head, teacher_head = world(0, 5, 8)
    poisoned = torch.full_like(other, math.nan)
    found = score_tokens(hidden, poisoned, ids, head, teacher_head, wanted=STUDENT_STATISTICS, tile_bytes=1)
    assert found.keys() == STUDENT_STATISTICS
    assert all(values.isfinite().all() for values in found.values())


def test_no_tokens_give_empty_statistics() -> None:
    hidden, other, ids, head, teacher_head = world(0, 0, 8)
    found = score_tokens(hidden, other, ids, head, teacher_head, wanted=ALL, tile_bytes=100)
    assert all(values.shape == (0,) for values in found.values())


def test_identical_models_have_exactly_no_divergence_below_zero() -> None:
    hidden, _, ids, head, _ = world(0, 200, 50, torch.float32)
    found = score_tokens(hidden, hidden, ids, head, head, wanted=ALL, tile_bytes=10_000)
    for name in ("reverse_kl", "forward_kl", "jsd"):
        assert 0 <= float(found[name].min()) <= float(found[name].max()) < 1e-6


def test_normalized_entropy_is_one_for_a_uniform_row() -> None:
    assert float(normalized_entropy(torch.tensor(math.log(50)), 50)) == pytest.approx(1.0)
