"""Top-k and sampled estimators: naive float64 versions, both losses, and their bias against the full divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.losses.test_divergence import logits
from tests.losses.test_loss import heads
from torch import Tensor

from tip_exp.losses import BACKENDS
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import SampledK1, TopK

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]
ALLOWED = [(kind, rest) for kind in KINDS for rest in ("tail", "renormalize")] + [("forward_kl", "drop")]


def over_events(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """One divergence of two lists of probabilities; beta 0.3, skew 0.2."""
    m = 0.3 * q + 0.7 * p
    terms = {
        "reverse_kl": p * (p / q).log(),
        "forward_kl": q * (q / p).log(),
        "jsd": 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log(),
        "skew_reverse_kl": p * (p / (0.2 * p + 0.8 * q)).log(),
        "skew_forward_kl": q * (q / (0.2 * q + 0.8 * p)).log(),
    }
    return terms[kind].sum()


def naive(kind: str, rest: str, support: str, k: int, z: Tensor, t: Tensor) -> Tensor:
    """Row by row, token by token."""
    found = []
    for p, q in zip(z.softmax(-1), t.softmax(-1), strict=True):
        ranked = sorted(range(len(p)), key=(p if support == "student" else q).tolist().__getitem__, reverse=True)
        inside, outside = ranked[:k], ranked[k:]
        ours, theirs = p[inside], q[inside]
        if rest == "renormalize":
            ours, theirs = ours / ours.sum(), theirs / theirs.sum()
        if rest == "tail" and outside:
            ours, theirs = torch.cat([ours, p[outside].sum()[None]]), torch.cat([theirs, q[outside].sum()[None]])
        found.append(over_events(kind, ours, theirs))
    return torch.stack(found)


def top_k(kind: str, rest: str, support: str, k: int) -> TopK:
    names: dict[str, Any] = {"support": support, "rest": rest}
    return TopK(Divergence(kind, 0.3, 0.2), k, **names)  # pyright: ignore[reportArgumentType]


def gradient(one: Divergence | TopK | SampledK1, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient at the student's logits, by the rows' own formula."""
    logp, logq = z.log_softmax(-1), t.log_softmax(-1)
    grad = logp.clone()
    return one.gradient_(grad, logp.exp(), logq.clone(), logq.exp()), grad


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize(("kind", "rest"), ALLOWED)
@settings(max_examples=12)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), vocab=st.integers(2, 12), k=st.integers(1, 13))
def test_top_k_is_the_naive_one(kind: str, rest: str, support: str, seed: int, rows: int, vocab: int, k: int) -> None:
    z, t = logits(seed, rows, vocab)
    z.requires_grad_()
    expected = naive(kind, rest, support, k, z, t)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    one = top_k(kind, rest, support, k)
    direct = one.value(z.log_softmax(-1), t.log_softmax(-1))
    (direct_grad,) = torch.autograd.grad(direct.sum(), z)
    value, grad = gradient(one, z.detach(), t)
    for mine, mine_grad in ((direct.detach(), direct_grad), (value, grad)):
        torch.testing.assert_close(mine, expected.detach(), **CLOSE)
        torch.testing.assert_close(mine_grad, expected_grad, **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", ["tail", "renormalize", "drop", "sampled_k1"])
def test_both_losses_take_them(name: str, backend: str, weighted: bool) -> None:
    """Through heads with bias and soft cap, tiles of three rows; the naive sum by autograd over whole logits."""
    head, teacher_head = heads(1, 11, 2, 0.5, 3.0, True)
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, other, weights = draw(8, 5), draw(8, 7), draw(8).abs() if weighted else None
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool()
    ids = torch.randint(11, (8,), generator=g)
    kind = "forward_kl" if name == "drop" else "reverse_kl"
    one = SampledK1(ids) if name == "sampled_k1" else top_k(kind, name, "student", 4)
    got = BACKENDS[backend](hidden, other, kept, head, teacher_head, one, 3 * 2 * 11 * 8, weights=weights)

    h = hidden.clone().requires_grad_()
    weight, assert_bias = head.weight.detach().clone().requires_grad_(), head.bias
    assert assert_bias is not None
    bias = assert_bias.detach().clone().requires_grad_()
    z = 3 * torch.tanh(0.5 * (h @ weight[:11].T + bias[:11]) / 3)
    t = 3 * torch.tanh(other @ teacher_head.weight.T / 3)
    if name == "sampled_k1":
        ours = z.log_softmax(-1)[torch.arange(8), ids]
        ratio = (ours - t.log_softmax(-1)[torch.arange(8), ids]).detach()
        surrogate, value = ratio * ours, ratio
    else:
        surrogate = value = naive(kind, name, "student", 4, z, t)
    factor = kept * (1 if weights is None else weights)
    expected = torch.autograd.grad((surrogate * factor).sum(), [h, weight, bias])
    torch.testing.assert_close(got.value, (value * factor).sum().detach(), **CLOSE)
    found = [got.hidden_grad, head.weight.grad, assert_bias.grad]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@given(seed=st.integers(0, 1000), vocab=st.integers(2, 30))
def test_the_sampled_token_is_unbiased(seed: int, vocab: int) -> None:
    """The expectation over every token of the vocabulary, each as often as the student samples it: sum p(y) g(y)."""
    z, t = logits(seed, 1, vocab)
    every = SampledK1(torch.arange(vocab))
    values, grads = gradient(every, z.expand(vocab, -1), t.expand(vocab, -1))
    p = z.softmax(-1)[0]
    value, grad = gradient(Divergence("reverse_kl"), z, t)
    torch.testing.assert_close((p * values).sum(), value[0], **CLOSE)
    torch.testing.assert_close(p @ grads, grad[0], **CLOSE)


def test_tokens_of_another_temperature_are_biased() -> None:
    """Why rollout.temperature must be 1: the same sum with tokens drawn from softmax(z / 0.7)."""
    z, t = logits(0, 1, 12)
    _, grads = gradient(SampledK1(torch.arange(12)), z.expand(12, -1), t.expand(12, -1))
    _, grad = gradient(Divergence("reverse_kl"), z, t)
    assert float(((z / 0.7).softmax(-1)[0] @ grads - grad[0]).norm() / grad.norm()) > 0.05


def bias(rest: str, support: str, k: int, z: Tensor, t: Tensor, kind: str = "reverse_kl") -> float:
    """Relative error of the summed gradients against the full divergence."""
    full = gradient(Divergence(kind, 0.3, 0.2), z, t)[1]  # pyright: ignore[reportArgumentType]
    return float((gradient(top_k(kind, rest, support, k), z, t)[1] - full).norm() / full.norm())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_top_ks_bias_is_there_and_falls_with_k(kind: str) -> None:
    z, t = logits(0, 400, 64)
    own = "student" if kind == "reverse_kl" else "teacher"
    for rest in ("tail", "renormalize"):
        errors = [bias(rest, own, k, z, t, kind) for k in (2, 4, 16, 48, 64)]
        assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-12


@pytest.mark.parametrize(
    ("kind", "own", "other"), [("reverse_kl", "student", "teacher"), ("forward_kl", "teacher", "student")]
)
def test_the_best_support_is_of_the_side_that_is_averaged_over(kind: str, own: str, other: str) -> None:
    z, t = logits(1, 400, 64)
    for rest in ("tail", "renormalize"):
        assert bias(rest, own, 8, z, t, kind) < bias(rest, other, 8, z, t, kind)


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    support=st.sampled_from(["student", "teacher"]),
)
def test_with_a_tail_the_estimate_is_between_zero_and_the_full_divergence(
    seed: int, k: int, kind: str, support: str
) -> None:
    z, t = logits(seed, 6, 10)
    coarse = top_k(kind, "tail", support, k).value(z.log_softmax(-1), t.log_softmax(-1))
    full = Divergence(kind, 0.3, 0.2).value(z.log_softmax(-1), t.log_softmax(-1))  # pyright: ignore[reportArgumentType]
    assert bool((coarse > -1e-12).all()) and bool((coarse < full + 1e-12).all())


def test_a_certain_row_gives_no_nan_in_float32() -> None:
    """The tail's probability underflows to 0; its logarithm does not."""
    z, t = torch.tensor([[200.0, 0, -1, -2]]), torch.tensor([[0.0, 200, 1, 2]])
    for kind, rest in ALLOWED:
        value, grad = gradient(top_k(kind, rest, "student", 2), z, t)
        assert bool(value.isfinite().all()) and bool(grad.isfinite().all()), (kind, rest)
