"""Several ids as one token: losses and statistics against float64 sums over grouped probabilities."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference
from tests.losses.test_loss import assert_equals_reference
from tests.losses.test_token_stats import assert_equal
from tests.reference import DIVERGENCE_NAMES, random_pair
from torch import Tensor

from tip_exp.losses import BACKENDS, fused
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import SampledK1, TopK
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.stop_class import merge_ids
from tip_exp.losses.tiling import LIVE_TILES
from tip_exp.losses.token_stats import token_stats
from tip_exp.selector.scores import STATISTICS

VOCAB = 45
CLASSES = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4, unique=True).map(tuple)
HEADS = st.sampled_from([{}, {"scale": 0.25, "bias": True}])
ROWS_OF_TILE = st.integers(1, 4)


def with_class(ids: tuple[int, ...], *models: LazyLogits) -> list[LazyLogits]:
    return [replace(model, head=replace(model.head, stop_class=ids)) for model in models]


def grouped(name: str, ids: tuple[int, ...], z: Tensor, t: Tensor) -> Tensor:
    p, q = (reference.one_class(x.softmax(-1), ids) for x in (z, t))
    return reference.divergence(name, p, q, 0.3, 0.2)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@settings(max_examples=6)
@given(seed=st.integers(0, 1000), ids=CLASSES, tile_rows=ROWS_OF_TILE, head=HEADS)
def test_value_and_gradients(
    backend: str, name: str, seed: int, ids: tuple[int, ...], tile_rows: int, head: dict[str, Any]
) -> None:
    student, teacher = with_class(ids, *random_pair(seed, 5, VOCAB, extra=2, **head))
    kept_mask, weights = torch.tensor([1, 0, 1, 1, 1]).bool(), torch.linspace(0.5, 2, 5).double()
    tile_bytes, objective = tile_rows * LIVE_TILES * VOCAB * 8, Divergence(name, 0.3, 0.2)
    result = BACKENDS[backend](student, teacher, kept_mask, objective, tile_bytes, weights=weights)
    assert_equals_reference(result, student, teacher, kept_mask * weights, partial(grouped, name, ids))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@settings(max_examples=12)
@given(seed=st.integers(0, 1000), ids=CLASSES, tile_bytes=st.integers(1, 3000), head=HEADS)
def test_the_ids_may_be_columns_of_different_tiles(
    name: str, seed: int, ids: tuple[int, ...], tile_bytes: int, head: dict[str, Any]
) -> None:
    student, teacher = with_class(ids, *random_pair(seed, 4, VOCAB, **head))
    kept_mask, token_ids = torch.tensor([1, 1, 0, 1]).bool(), torch.zeros(4).long()
    stats = token_stats(student, teacher, token_ids, wanted=frozenset({"reverse_kl"}), tile_bytes=tile_bytes)
    loss = partial(fused, log_normalizers=stats.log_normalizers)
    result = loss(student, teacher, kept_mask, Divergence(name), tile_bytes)
    assert_equals_reference(result, student, teacher, kept_mask.double(), partial(grouped, name, ids))


@settings(max_examples=12)
@given(seed=st.integers(0, 1000), ids=CLASSES, tile_rows=ROWS_OF_TILE, head=HEADS)
def test_every_statistic(seed: int, ids: tuple[int, ...], tile_rows: int, head: dict[str, Any]) -> None:
    student, teacher = random_pair(seed, 6, VOCAB, **head)
    token_ids = torch.randint(VOCAB, (6,), generator=torch.Generator().manual_seed(seed))
    token_ids[:2] = ids[-1]  # a response that ends, by an id that does not stand for the class
    values = token_stats(
        *with_class(ids, student, teacher),
        merge_ids(token_ids, ids),
        wanted=frozenset(STATISTICS),
        tile_bytes=tile_rows * LIVE_TILES * VOCAB * 8,
        jsd_beta=0.3,
        top_k=3,
    ).values
    assert_equal(values, reference.token_statistics(student, teacher, token_ids, 0.3, 3, ids))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_estimators(backend: str) -> None:
    ids, kept_mask = (3, 40), torch.ones(6, dtype=torch.bool)
    student, teacher = with_class(ids, *random_pair(0, 6, VOCAB))
    token_ids = torch.tensor([40, 3, 1, 7, 9, 40])
    result = BACKENDS[backend](student, teacher, kept_mask, TopK(Divergence("jsd", 0.3), 4, "student", "tail"), 1 << 12)

    def top_4(z: Tensor, t: Tensor) -> Tensor:
        logp, logq = (reference.one_class(x.softmax(-1), ids).log() for x in (z, t))
        return reference.top_k_divergence("jsd", "tail", "student", 4, logp, logq, 0.3)

    assert_equals_reference(result, student, teacher, kept_mask.double(), top_4)
    student.head.weight.grad = None
    result = BACKENDS[backend](student, teacher, kept_mask, SampledK1(merge_ids(token_ids, ids)), 1 << 12)

    def sampled(z: Tensor, t: Tensor) -> Tensor:
        stops = torch.tensor([token in ids for token in token_ids.tolist()])
        logp, logq = (
            torch.where(stops, x[:, list(ids)].sum(-1), x[torch.arange(6), token_ids]).log()
            for x in (z.softmax(-1), t.softmax(-1))
        )
        ratio = (logp - logq).detach()
        return ratio + ratio * (logp - logp.detach())

    assert_equals_reference(result, student, teacher, kept_mask.double(), sampled)


def test_models_that_stop_at_different_ids_agree_on_the_event() -> None:
    """One puts its mass on id 1 and the other on id 2: the KL of the ids is large, that of the class zero."""
    logits = torch.zeros(1, 6, dtype=torch.float64)
    student, teacher = logits.clone(), logits.clone()
    student[0, 1], teacher[0, 2] = 5, 5
    eye = torch.eye(6, dtype=torch.float64)
    models = [LazyLogits(x, replace(random_pair(0, 1, 6)[0].head, weight=eye)) for x in (student, teacher)]
    kl = [
        token_stats(*pair, torch.tensor([1]), wanted=frozenset({"reverse_kl"}), tile_bytes=1 << 12).values["reverse_kl"]
        for pair in (models, with_class((1, 2), *models))
    ]
    assert float(kl[0]) > 4 and float(kl[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_less_precision(dtype: torch.dtype) -> None:
    """Head.logits, for autograd and without gradient, and the tiles hold the same class."""
    ids = (3, 40)
    (student,) = with_class(ids, random_pair(0, 3, VOCAB, dtype=dtype)[0])
    tiles = torch.empty(3, VOCAB)
    with torch.no_grad():
        student.head.logits_into(tiles, student.hidden, slice(0, VOCAB))
    torch.testing.assert_close(student.head.logits(student.hidden).detach(), tiles, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(student.head.logits(student.hidden), tiles, rtol=1e-4, atol=1e-4)


def test_a_soft_capped_head_is_refused() -> None:
    with pytest.raises(ValueError, match="soft-capped output head cannot"):
        with_class((1, 2), random_pair(0, 1, 6, softcap=2.0)[0])
