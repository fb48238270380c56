"""Divergences against float64 sums over probabilities, and the paper's identities."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from tests.reference import DIVERGENCE_NAMES, random_logits
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.losses import divergence
from tip_exp.losses.divergence import DIVERGENCES, Divergence


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(0, 5),
    vocab=st.integers(2, 40),
    beta=st.floats(0.01, 0.99),
    skew=st.floats(0.01, 0.99),
    clip=st.floats(0.5, 8.0),
)
def test_value_and_gradient_equal_the_reference(
    name: str, seed: int, rows: int, vocab: int, beta: float, skew: float, clip: float
) -> None:
    z, t = random_logits(seed, rows, vocab)
    z.requires_grad_()
    expected = reference.divergence(name, z.softmax(-1), t.softmax(-1), beta, skew, clip)
    value = Divergence(name, beta, skew, clip).value(z.log_softmax(-1), t.log_softmax(-1))
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


def test_the_config_accepts_exactly_the_registered_divergences() -> None:
    assert set(get_args(LearnerConfig.model_fields["divergence"].annotation)) == set(DIVERGENCES)
    assert set(DIVERGENCE_NAMES) == set(DIVERGENCES), "tests/reference.py has a formula for each"


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(AssertionError, match="reverse_k is not one of reverse_kl, forward_kl"):
        Divergence("reverse_k")


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_float32_is_close_to_float64(name: str) -> None:
    z, t = random_logits(0, 64, 1000)
    expected = reference.divergence(name, z.softmax(-1), t.softmax(-1), 0.3)
    value = Divergence(name, 0.3).value(z.float().log_softmax(-1), t.float().log_softmax(-1))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_equal_models_have_zero_divergence_and_zero_gradient(name: str) -> None:
    z, _ = random_logits(1, 4, 10)
    z.requires_grad_()
    value = Divergence(name).value(z.log_softmax(-1), z.detach().log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2() -> None:
    z, t = random_logits(2, 16, 30)
    logp, logq = (10 * z).log_softmax(-1), (10 * t).log_softmax(-1)
    jsd = divergence.jsd(logp, logq, 0.5)
    torch.testing.assert_close(jsd, divergence.jsd(logq, logp, 0.5))
    assert 0.5 < float(jsd.max()) <= math.log(2) * (1 + 1e-14)


def test_a_clipped_kl_is_constant_above_its_limit() -> None:
    """KL of (0.5, 0.5) to (0.25, 0.75): 0.5 ln 2 + 0.5 ln 2/3 = 0.1438; to (0.01, 0.99): 1.6145, which is clipped."""
    z = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.25, 0.75], [0.01, 0.99]], dtype=torch.float64)
    value = Divergence("clipped_kl", kl_clip=1.0).value(z.log_softmax(-1), t.log())
    assert value.tolist() == pytest.approx([0.5 * math.log(4 / 3), 1.0])
    (grad,) = torch.autograd.grad(value.sum(), z)
    # p (log p/q - KL), with log p/q = ln 2 and ln 2/3
    assert grad[0].tolist() == pytest.approx([0.25 * math.log(3), -0.25 * math.log(3)])
    assert grad[1].tolist() == [0.0, 0.0]


def test_paper_a1_gradient_and_hessian_of_forward_kl() -> None:
    """App. A.1: KL(P_T || P_S) has gradient P_S - P_T and Hessian diag(P_S) - P_S P_S^T, of trace 1 - sum P_S^2."""
    z, t = random_logits(3, 1, 7)
    z, logq = z[0], t[0].log_softmax(-1)

    def loss(x: Tensor) -> Tensor:
        return divergence.forward_kl(x.log_softmax(-1)[None], logq[None]).sum()

    p = z.softmax(-1)
    gradient = torch.autograd.functional.jacobian(loss, z)
    hessian = torch.autograd.functional.hessian(loss, z)
    assert isinstance(hessian, Tensor)
    torch.testing.assert_close(gradient, p - logq.exp())
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(hessian.trace(), 1 - p.square().sum())
