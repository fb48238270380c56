"""Top-k and sampled estimates: the reference in float64, both losses, and their bias against the full divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference
from tests.reference import DIVERGENCE_NAMES, random_logits, random_pair
from torch import Tensor

from tip_exp.losses import BACKENDS
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import Objective, SampledK1, TopK

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
ALLOWED = [(name, rest) for name in DIVERGENCE_NAMES for rest in ("tail", "renormalize")] + [("forward_kl", "drop")]


def top_k(name: str, rest: Any, support: Any, k: int) -> TopK:
    return TopK(Divergence(name, 0.3, 0.2), k, support, rest)


def value_and_grad(objective: Objective, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Value per row (n,) and gradient at the student's logits (n, V)."""
    leaf = z.detach().clone().requires_grad_()
    value = objective.value(leaf.log_softmax(-1), t.log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize(("name", "rest"), ALLOWED)
@settings(max_examples=12)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), vocab=st.integers(2, 12), k=st.integers(1, 13))
def test_top_k_equals_the_reference(
    name: str, rest: str, support: str, seed: int, rows: int, vocab: int, k: int
) -> None:
    z, t = random_logits(seed, rows, vocab)
    z.requires_grad_()
    expected = reference.top_k_divergence(name, rest, support, k, z, t, 0.3, 0.2)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    value, grad = value_and_grad(top_k(name, rest, support, k), z, t)
    torch.testing.assert_close(value, expected.detach(), **CLOSE)
    torch.testing.assert_close(grad, expected_grad, **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("estimator", ["tail", "renormalize", "drop", "sampled_k1"])
def test_both_backends_accept_estimators(estimator: str, backend: str, weighted: bool) -> None:
    """Heads with bias and soft cap, tiles of three rows."""
    student, teacher = random_pair(1, 8, 11, extra=2, scale=0.5, softcap=3.0, bias=True)
    g = torch.Generator().manual_seed(2)
    weights = torch.rand(8, generator=g, dtype=torch.float64) if weighted else None
    kept_mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool()
    token_ids = torch.randint(11, (8,), generator=g)
    name = "forward_kl" if estimator == "drop" else "reverse_kl"
    objective = SampledK1(token_ids) if estimator == "sampled_k1" else top_k(name, estimator, "student", 4)

    def per_token(z: Tensor, t: Tensor) -> Tensor:
        """For the sampled token: r log P_S(y) with r constant, whose gradient is that of the estimate."""
        if estimator != "sampled_k1":
            return reference.top_k_divergence(name, estimator, "student", 4, z, t)
        student_logprob, teacher_logprob = (x.log_softmax(-1)[torch.arange(8), token_ids] for x in (z, t))
        return (student_logprob - teacher_logprob).detach() * student_logprob

    def sampled_ratio(z: Tensor, t: Tensor) -> Tensor:
        student_logprob, teacher_logprob = (x.log_softmax(-1)[torch.arange(8), token_ids] for x in (z, t))
        return student_logprob - teacher_logprob

    result = BACKENDS[backend](student, teacher, kept_mask, objective, 3 * 2 * 11 * 8, weights=weights)
    token_weights = kept_mask * (1.0 if weights is None else weights)
    value, *grads = reference.masked_loss(student, teacher, token_weights, per_token)
    if estimator == "sampled_k1":
        value, *_ = reference.masked_loss(student, teacher, token_weights, sampled_ratio)
    torch.testing.assert_close(result.value, value, **CLOSE)
    assert student.head.bias is not None
    for grad, expected in zip(
        [result.hidden_grad, student.head.weight.grad, student.head.bias.grad], grads, strict=True
    ):
        torch.testing.assert_close(grad, expected, **CLOSE)


@given(seed=st.integers(0, 1000), vocab=st.integers(2, 30))
def test_the_sampled_token_is_unbiased(seed: int, vocab: int) -> None:
    """The expectation over the student's distribution: sum over all tokens y of p(y) x the estimate from y."""
    z, t = random_logits(seed, 1, vocab)
    all_tokens = SampledK1(torch.arange(vocab))
    values, grads = value_and_grad(all_tokens, z.expand(vocab, -1), t.expand(vocab, -1))
    p = z.softmax(-1)[0]
    value, grad = value_and_grad(Divergence("reverse_kl"), z, t)
    torch.testing.assert_close((p * values).sum(), value[0], **CLOSE)
    torch.testing.assert_close(p @ grads, grad[0], **CLOSE)


def test_tokens_sampled_at_another_temperature_give_a_biased_gradient() -> None:
    """Why rollout.temperature must be 1: the same expectation with tokens drawn from softmax(z / 0.7)."""
    z, t = random_logits(0, 1, 12)
    _, grads = value_and_grad(SampledK1(torch.arange(12)), z.expand(12, -1), t.expand(12, -1))
    _, grad = value_and_grad(Divergence("reverse_kl"), z, t)
    assert float(((z / 0.7).softmax(-1)[0] @ grads - grad[0]).norm() / grad.norm()) > 0.05


def bias(rest: str, support: str, k: int, z: Tensor, t: Tensor, name: str) -> float:
    """Relative error of the gradient against the full divergence."""
    _, full_grad = value_and_grad(Divergence(name, 0.3, 0.2), z, t)
    _, grad = value_and_grad(top_k(name, rest, support, k), z, t)
    return float((grad - full_grad).norm() / full_grad.norm())


@pytest.mark.parametrize(("name", "support"), [("reverse_kl", "student"), ("forward_kl", "teacher")])
@pytest.mark.parametrize("rest", ["tail", "renormalize"])
def test_top_k_is_biased_and_less_so_with_larger_k(name: str, support: str, rest: str) -> None:
    z, t = random_logits(0, 400, 64)
    errors = [bias(rest, support, k, z, t, name) for k in (2, 4, 16, 48, 64)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-12


@pytest.mark.parametrize(
    ("name", "support", "worse_support"), [("reverse_kl", "student", "teacher"), ("forward_kl", "teacher", "student")]
)
@pytest.mark.parametrize("rest", ["tail", "renormalize"])
def test_the_best_support_is_the_distribution_averaged_over(
    name: str, support: str, worse_support: str, rest: str
) -> None:
    z, t = random_logits(1, 400, 64)
    assert bias(rest, support, 8, z, t, name) < bias(rest, worse_support, 8, z, t, name)


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 9),
    name=st.sampled_from(DIVERGENCE_NAMES),
    support=st.sampled_from(["student", "teacher"]),
)
def test_with_a_tail_the_estimate_is_between_zero_and_the_full_divergence(
    seed: int, k: int, name: str, support: str
) -> None:
    z, t = random_logits(seed, 6, 10)
    estimate = top_k(name, "tail", support, k).value(z.log_softmax(-1), t.log_softmax(-1))
    full = Divergence(name, 0.3, 0.2).value(z.log_softmax(-1), t.log_softmax(-1))
    assert bool((estimate > -1e-12).all()) and bool((estimate < full + 1e-12).all())


@pytest.mark.parametrize(("name", "rest"), ALLOWED)
def test_a_certain_row_gives_finite_values_in_float32(name: str, rest: str) -> None:
    """The tail's probability underflows to 0; its logarithm does not."""
    z, t = torch.tensor([[200.0, 0, -1, -2]]), torch.tensor([[0.0, 200, 1, 2]])
    value, grad = value_and_grad(top_k(name, rest, "student", 2), z, t)
    assert bool(value.isfinite().all()) and bool(grad.isfinite().all())
