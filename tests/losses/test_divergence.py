"""Divergences against naive float64 sums, their gradients against autograd, and the paper's identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tip_exp.losses import divergence
from tip_exp.losses.divergence import Divergence

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]


def naive(kind: str, z: Tensor, t: Tensor, beta: float) -> Tensor:
    """One number a row, by plain sums over the vocabulary."""
    p, q = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True), torch.exp(t) / torch.exp(t).sum(-1, keepdim=True)
    if kind == "reverse_kl":
        return (p * torch.log(p / q)).sum(-1)
    if kind == "forward_kl":
        return (q * torch.log(q / p)).sum(-1)
    if kind == "skew_reverse_kl":
        return (p * torch.log(p / (0.1 * p + 0.9 * q))).sum(-1)
    if kind == "skew_forward_kl":
        return (q * torch.log(q / (0.1 * q + 0.9 * p))).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * torch.log(q / m)).sum(-1) + (1 - beta) * (p * torch.log(p / m)).sum(-1)


def logits(seed: int, rows: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.to(dtype), t.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), rows=st.integers(0, 5), vocab=st.integers(2, 40), beta=st.floats(0.01, 0.99))
def test_value_and_gradient_equal_the_naive_ones(kind: str, seed: int, rows: int, vocab: int, beta: float) -> None:
    z, t = logits(seed, rows, vocab)
    z.requires_grad_()
    expected = naive(kind, z, t, beta)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    one = Divergence(kind, beta)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        value, grad = one.value_and_logit_grad(z.log_softmax(-1), t.log_softmax(-1))
        direct = one.value(z.log_softmax(-1), t.log_softmax(-1))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(direct, expected.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind: str) -> None:
    z, t = logits(0, 64, 1000)
    exact = naive(kind, z, t, 0.3)
    one = Divergence(kind, 0.3)  # pyright: ignore[reportArgumentType]
    rough = one.value(z.float().log_softmax(-1), t.float().log_softmax(-1))
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=1e-6)


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    z, _ = logits(1, 4, 10)
    for kind in KINDS:
        value, grad = Divergence(kind).value_and_logit_grad(z.log_softmax(-1), z.log_softmax(-1))  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2() -> None:
    z, t = logits(2, 16, 30)
    lp, lq = (10 * z).log_softmax(-1), (10 * t).log_softmax(-1)
    forth, back = divergence.jsd(lp, lq, 0.5), divergence.jsd(lq, lp, 0.5)
    torch.testing.assert_close(forth, back)
    assert float(forth.max()) <= math.log(2) * (1 + 1e-14)


def test_entropy_of_uniform_and_of_certain_rows() -> None:
    uniform = torch.zeros(1, 8, dtype=torch.float64).log_softmax(-1)
    certain = torch.tensor([[0.0, -100.0, -100.0]], dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(divergence.entropy(uniform), torch.tensor([math.log(8)], dtype=torch.float64))
    assert float(divergence.entropy(certain)) < 1e-12


def test_paper_a1_gradient_and_hessian_of_forward_kl() -> None:
    """App. A.1: KL(P_T || P_S) has gradient P_S - P_T and Hessian diag(P_S) - P_S P_S^T, of trace 1 - sum P_S^2."""
    z, t = logits(3, 1, 7)
    z, lq = z[0], t[0].log_softmax(-1)

    def loss(x: Tensor) -> Tensor:
        return divergence.forward_kl(x.log_softmax(-1)[None], lq[None]).sum()

    p = z.softmax(-1)
    gradient = torch.autograd.functional.jacobian(loss, z)
    hessian = torch.autograd.functional.hessian(loss, z)
    assert isinstance(hessian, Tensor)
    torch.testing.assert_close(gradient, p - lq.exp())
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(hessian.trace(), 1 - p.square().sum())
