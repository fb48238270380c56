"""Statistics of tokens against float64 sums over whole logits, for any tile size and dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from tests.reference import random_pair
from torch import Tensor

from tip_exp.losses import head as head_module
from tip_exp.losses import tiling
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.tiling import LIVE_TILES
from tip_exp.losses.token_stats import token_stats, top_tokens
from tip_exp.selector.scores import STATISTICS, STUDENT_STATISTICS

ALL = frozenset(STATISTICS)


def random_tokens(
    seed: int, n: int, vocab: int, dtype: torch.dtype = torch.float64, **head: Any
) -> tuple[LazyLogits, LazyLogits, Tensor]:
    token_ids = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
    return *random_pair(seed, n, vocab, dtype=dtype, **head), token_ids


def assert_equal(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys() == ALL
    for name in STATISTICS:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 9),
    vocab=st.integers(4, 30),
    tile_rows=st.integers(1, 5),
    head=st.sampled_from([{}, {"scale": 0.5, "softcap": 3.0, "bias": True}]),
)
def test_every_statistic_equals_its_reference_whatever_the_tiles(
    seed: int, n: int, vocab: int, tile_rows: int, head: dict[str, Any]
) -> None:
    pair_and_ids = random_tokens(seed, n, vocab, **head)
    tile_bytes = tile_rows * LIVE_TILES * vocab * 8
    values = token_stats(*pair_and_ids, wanted=ALL, tile_bytes=tile_bytes, jsd_beta=0.3, top_k=3).values
    assert_equal(values, reference.token_statistics(*pair_and_ids, jsd_beta=0.3, k=3))


@given(
    seed=st.integers(0, 1000),
    vocab=st.integers(100, 700),
    gemm_elements=st.integers(1, 1500),
    tile_rows=st.integers(1, 7),
)
def test_whole_rows_may_take_several_gemms_and_blocks(
    seed: int, vocab: int, gemm_elements: int, tile_rows: int
) -> None:
    pair_and_ids = random_tokens(seed, 5, vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "LOGIT_ROWS", gemm_elements)
        patch.setitem(tiling.BLOCK_ELEMENTS, "cpu", gemm_elements // 2 + 1)
        tile_bytes = tile_rows * LIVE_TILES * vocab * 8
        values = token_stats(*pair_and_ids, wanted=ALL, tile_bytes=tile_bytes, top_k=20).values
    assert_equal(values, reference.token_statistics(*pair_and_ids, jsd_beta=0.5, k=20))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_low_precision_weights_are_accumulated_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    pair_and_ids = random_tokens(0, 40, 50, dtype)
    values = token_stats(*pair_and_ids, wanted=ALL, tile_bytes=10_000).values
    expected = reference.token_statistics(*pair_and_ids, jsd_beta=0.5, k=10)
    for name in STATISTICS:
        assert values[name].dtype == torch.float32
        if name != "topk_overlap":
            torch.testing.assert_close(values[name].double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_gradient_norm_changes_no_bit_of_the_statistics_beside_it() -> None:
    pair_and_ids = random_tokens(0, 40, 500, torch.float32)
    values, with_norm = (
        token_stats(*pair_and_ids, wanted=wanted, tile_bytes=10_000) for wanted in (ALL - {"grad_norm"}, ALL)
    )
    assert with_norm.log_normalizers is not None and values.log_normalizers is not None
    assert all(a.equal(b) for a, b in zip(values.log_normalizers, with_norm.log_normalizers, strict=True))
    assert all(with_norm.values[name].equal(values.values[name]) for name in ALL - {"grad_norm"})


def test_student_statistics_do_not_project_the_teacher() -> None:
    student, teacher, token_ids = random_tokens(0, 5, 8)
    nan_teacher = LazyLogits(torch.full_like(teacher.hidden, math.nan), teacher.head)
    stats = token_stats(student, nan_teacher, token_ids, wanted=STUDENT_STATISTICS, tile_bytes=1)
    assert stats.values.keys() == STUDENT_STATISTICS and stats.log_normalizers is None
    assert all(values.isfinite().all() for values in stats.values.values())


def test_no_tokens_give_empty_statistics() -> None:
    student, teacher, token_ids = random_tokens(0, 0, 8)
    stats = token_stats(student, teacher, token_ids, wanted=ALL, tile_bytes=100)
    assert stats.values.keys() == ALL and all(values.shape == (0,) for values in stats.values.values())
    assert stats.log_normalizers is not None and len(stats.log_normalizers.student) == 0


@pytest.mark.parametrize("token_id", [-1, 8])
def test_a_token_outside_the_vocabulary_is_an_error(token_id: int) -> None:
    student, teacher, token_ids = random_tokens(0, 5, 8)
    token_ids[3] = token_id
    with pytest.raises(ValueError, match=f"token id {token_id} is not one of the 8 ids that both models have"):
        token_stats(student, teacher, token_ids, wanted=ALL, tile_bytes=100)


def test_divergences_of_identical_models_are_not_negative() -> None:
    student, _, token_ids = random_tokens(0, 200, 50, torch.float32)
    values = token_stats(student, student, token_ids, wanted=ALL, tile_bytes=10_000).values
    for name in ("reverse_kl", "forward_kl", "jsd"):
        assert 0 <= float(values[name].min()) <= float(values[name].max()) < 1e-6


@given(seed=st.integers(0, 1000), n=st.integers(0, 6), vocab=st.integers(2, 20), tile_bytes=st.integers(1, 2000))
def test_top_tokens_are_the_most_likely_with_their_probabilities(
    seed: int, n: int, vocab: int, tile_bytes: int
) -> None:
    student, _, _ = random_tokens(seed, n, vocab)
    ids, probabilities = top_tokens(student.hidden, student.head, 4, tile_bytes)
    p = (student.hidden @ student.head.weight.detach().T).softmax(-1)
    expected, expected_ids = p.sort(-1, descending=True)
    assert ids.equal(expected_ids[:, :4])
    torch.testing.assert_close(probabilities.double(), expected[:, :4])
