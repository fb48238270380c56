"""Both backends against autograd over whole float64 logits: values, gradients of hidden states and head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from tests.reference import DIVERGENCE_NAMES, random_pair
from torch import Tensor

from tip_exp.losses import BACKENDS, LossAndGrad, fused, tiling
from tip_exp.losses import head as head_module
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.losses.tiling import LIVE_TILES
from tip_exp.losses.token_stats import token_stats
from tip_exp.selector.scores import STATISTICS

CLIP = 2.0
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
PLAIN = {"scale": 1.0, "softcap": None, "bias": False}
HEADS = st.sampled_from(
    [
        PLAIN,
        {"scale": 0.25, "softcap": None, "bias": True},
        {"scale": 1.0, "softcap": 2.0, "bias": False},
        {"scale": 0.5, "softcap": 3.0, "bias": True},
    ]
)


def of_logits(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The reference divergence of logits at jsd_beta 0.3, skew 0.2 and a clip that about half of the tokens exceed."""
    return lambda z, t: reference.divergence(name, z.softmax(-1), t.softmax(-1), 0.3, 0.2, CLIP)


def assert_equals_reference(
    result: LossAndGrad, student: LazyLogits, teacher: LazyLogits, token_weights: Tensor, per_token: Callable
) -> None:
    value, hidden_grad, *head_grads = reference.masked_loss(student, teacher, token_weights, per_token)
    torch.testing.assert_close(result.value, value, **CLOSE)
    torch.testing.assert_close(result.hidden_grad, hidden_grad, **CLOSE)
    parameters = [student.head.weight] if student.head.bias is None else [student.head.weight, student.head.bias]
    for parameter, expected in zip(parameters, head_grads, strict=True):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad, expected, **CLOSE)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@given(
    seed=st.integers(0, 1000),
    kept=st.lists(st.booleans(), min_size=1, max_size=8),
    weighted=st.booleans(),
    vocab=st.integers(3, 20),
    extra=st.integers(0, 3),
    tile_rows=st.integers(1, 4),
    head=HEADS,
)
def test_value_and_gradients(
    backend: str,
    name: str,
    seed: int,
    kept: list[bool],
    weighted: bool,
    vocab: int,
    extra: int,
    tile_rows: int,
    head: dict[str, Any],
) -> None:
    student, teacher = random_pair(seed, len(kept), vocab, extra=extra, **head)
    kept_mask, objective = torch.tensor(kept), Divergence(name, 0.3, 0.2, CLIP)
    weights = torch.linspace(0.5, 2, len(kept)).double() if weighted else None
    tile_bytes = tile_rows * LIVE_TILES * vocab * 8
    result = BACKENDS[backend](student, teacher, kept_mask, objective, tile_bytes, weights=weights)
    token_weights = kept_mask * (1.0 if weights is None else weights)
    assert_equals_reference(result, student, teacher, token_weights, of_logits(name))
    assert not result.hidden_grad[~kept_mask].any()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@given(
    seed=st.integers(0, 1000),
    kept=st.lists(st.booleans(), min_size=1, max_size=12),
    vocab=st.integers(3, 20),
    tile_bytes=st.integers(1, 3000),
    head=HEADS,
)
def test_log_normalizers_of_the_statistics_give_the_same_result_in_tiles_of_any_shape(
    name: str, seed: int, kept: list[bool], vocab: int, tile_bytes: int, head: dict[str, Any]
) -> None:
    student, teacher = random_pair(seed, len(kept), vocab, **head)
    kept_mask, weights = torch.tensor(kept), torch.linspace(0.5, 2, len(kept)).double()
    token_ids, wanted = torch.zeros(len(kept), dtype=torch.long), frozenset({"entropy", "reverse_kl"})
    stats = token_stats(student, teacher, token_ids, wanted=wanted, tile_bytes=tile_bytes)
    assert stats.log_normalizers is not None
    loss = partial(fused, log_normalizers=stats.log_normalizers, weights=weights)
    result = loss(student, teacher, kept_mask, Divergence(name), tile_bytes)
    assert_equals_reference(result, student, teacher, kept_mask * weights, of_logits(name))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    vocab=st.integers(60, 400),
    gemm_elements=st.integers(1, 1000),
    head=HEADS,
)
def test_whole_rows_may_take_several_gemms_and_blocks(
    name: str, seed: int, n: int, vocab: int, gemm_elements: int, head: dict[str, Any]
) -> None:
    student, teacher = random_pair(seed, n, vocab, extra=2, **head)
    kept_mask = torch.ones(n, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "LOGIT_ROWS", gemm_elements)
        patch.setattr(head_module, "PRODUCT_ROWS", gemm_elements)
        patch.setitem(tiling.BLOCK_ELEMENTS, "cpu", gemm_elements // 2 + 1)
        result = fused(student, teacher, kept_mask, Divergence(name, 0.3), 1 << 20)
    assert_equals_reference(result, student, teacher, kept_mask.double(), of_logits(name))


def without_tokens(model: LazyLogits, excluded: list[int]) -> tuple[LazyLogits, LazyLogits]:
    """The model with a bias of -inf at some tokens, and the model with a vocabulary that lacks them."""
    weight, vocab = model.head.weight.detach(), model.head.vocab_size
    rest, bias = [i for i in range(vocab) if i not in excluded], torch.linspace(-1, 1, vocab).double()
    smaller = LazyLogits(model.hidden, Head(weight[rest].requires_grad_(), len(rest), bias[rest]))
    bias[excluded] = float("-inf")
    return LazyLogits(model.hidden, Head(weight.clone().requires_grad_(), vocab, bias)), smaller


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 3),
    excluded=st.sets(st.integers(0, 69), min_size=1, max_size=69).map(sorted),
    tile_bytes=st.integers(1000, 6000),
)
def test_tokens_that_both_models_exclude_are_as_if_absent(
    name: str, seed: int, n: int, excluded: list[int], tile_bytes: int
) -> None:
    """A logit of -inf has probability 0 and adds 0 to every sum, also where it fills a whole tile."""
    students, teachers = (without_tokens(model, excluded) for model in random_pair(seed, n, 70))
    token_ids, kept_mask, objective = (
        torch.zeros(n).long(),
        torch.ones(n, dtype=torch.bool),
        Divergence(name, 0.3, 0.2, CLIP),
    )
    rest = [i for i in range(70) if i not in excluded]
    wanted = frozenset(STATISTICS) - {"topk_overlap"}
    stats = token_stats(students[0], teachers[0], token_ids + rest[0], wanted=wanted, tile_bytes=tile_bytes)
    smaller_stats = token_stats(students[1], teachers[1], token_ids, wanted=wanted, tile_bytes=tile_bytes)
    for statistic, values in stats.values.items():
        torch.testing.assert_close(values, smaller_stats.values[statistic], **CLOSE, msg=statistic)
    smaller = fused(students[1], teachers[1], kept_mask, objective, 1 << 20)
    for loss in (*BACKENDS.values(), partial(fused, log_normalizers=stats.log_normalizers)):
        students[0].head.weight.grad = None
        result = loss(students[0], teachers[0], kept_mask, objective, tile_bytes)
        torch.testing.assert_close(result.value, smaller.value, **CLOSE)
        torch.testing.assert_close(result.hidden_grad, smaller.hidden_grad, **CLOSE)
        grad = students[0].head.weight.grad
        assert grad is not None and not grad[excluded].any()
        torch.testing.assert_close(grad[rest], students[1].head.weight.grad, **CLOSE)


@pytest.mark.parametrize(("student_excludes", "teacher_excludes"), [([3], []), ([], [3]), ([3], [4])])
def test_tokens_that_one_model_excludes_are_an_error(student_excludes: list[int], teacher_excludes: list[int]) -> None:
    """A model that excludes none has no bias."""
    models = zip(random_pair(0, 4, 6), (student_excludes, teacher_excludes), strict=True)
    student, teacher = (without_tokens(model, excluded)[0] if excluded else model for model, excluded in models)
    token_ids, kept_mask = torch.zeros(4).long(), torch.ones(4, dtype=torch.bool)
    message = "-inf at token 3 for the (student|teacher) but not for the (student|teacher).*KL.*infinite"
    for loss in BACKENDS.values():
        with pytest.raises(ValueError, match=message):
            loss(student, teacher, kept_mask, Divergence("reverse_kl"), 1 << 20)
    with pytest.raises(ValueError, match=message):
        token_stats(student, teacher, token_ids, wanted=frozenset({"reverse_kl"}), tile_bytes=1 << 20)
    token_stats(student, teacher, token_ids, wanted=frozenset({"entropy"}), tile_bytes=1 << 20)  # of the student alone


def test_head_gradients_are_added_to_existing_ones() -> None:
    student, teacher = random_pair(0, 4, 6)
    kept_mask, objective = torch.ones(4, dtype=torch.bool), Divergence("reverse_kl")
    fused(student, teacher, kept_mask, objective, 1 << 20)
    assert student.head.weight.grad is not None
    first = student.head.weight.grad.clone()
    fused(student, teacher, kept_mask, objective, 1 << 20)
    torch.testing.assert_close(student.head.weight.grad, 2 * first)


@pytest.mark.parametrize("backend", ["fused", "fused, reusing log-normalizers", "materialized"])
@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_relative_error_in_low_precision(dtype: torch.dtype, limit: float, name: str, backend: str) -> None:
    """Against float64 sums over the same rounded weights and hidden states; 16-bit gradients are rounded, values not.

    Logits have a standard deviation of 2.4; one rounded to bfloat16 would be wrong by up to 0.02 nats.
    """
    g = torch.Generator().manual_seed(0)
    n, width, vocab = 256, 32, 300

    def draw(rows: int) -> Tensor:
        return (torch.randn(rows, width, generator=g) * width**-0.25).to(dtype)

    student_hidden, teacher_hidden, weight, teacher_weight = draw(n), draw(n), draw(vocab), draw(vocab)
    student = LazyLogits(student_hidden, Head(weight.requires_grad_(), vocab))
    teacher = LazyLogits(teacher_hidden, Head(teacher_weight, vocab))
    kept_mask, token_ids = torch.arange(n) % 2 == 0, torch.zeros(n, dtype=torch.long)
    stats = token_stats(student, teacher, token_ids, wanted=frozenset({"reverse_kl"}), tile_bytes=1 << 16)
    log_normalizers = stats.log_normalizers if "reusing" in backend else None
    loss, objective = BACKENDS[backend.split(",")[0]], Divergence(name, 0.3, 0.2, CLIP)
    result = loss(student, teacher, kept_mask, objective, 1 << 16, log_normalizers=log_normalizers)
    value, hidden_grad, weight_grad = reference.masked_loss(student, teacher, kept_mask.double(), of_logits(name))
    assert abs(float(result.value) / float(value) - 1) < 1e-6
    for grad, expected in ((result.hidden_grad, hidden_grad), (student.head.weight.grad, weight_grad)):
        assert grad is not None
        assert float((grad.double() - expected).norm() / expected.norm()) < limit
