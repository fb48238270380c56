"""Both backends against naive autograd over whole logits: values, hidden gradients, head gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tip_exp.losses import BACKENDS
from tip_exp.losses import tiling as tiles
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.fused import fused
from tip_exp.losses.head import Head
from tip_exp.losses.materialized import materialized
from tip_exp.losses.tiling import TILES_ALIVE
from tip_exp.losses.token_stats import measure

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]


def heads(seed: int, vocab: int, extra: int, scale: float, softcap: float | None, bias: bool) -> tuple[Head, Head]:
    """Student and teacher heads of widths 5 and 7; `extra` rows lie beyond the shared vocabulary."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weight, teacher_weight = draw(vocab + extra, 5).requires_grad_(), draw(vocab, 7)
    b = draw(vocab + extra).requires_grad_() if bias else None
    return Head(weight, vocab, b, scale, softcap), Head(teacher_weight, vocab, None, 1.0, softcap)


def naive(hidden: Tensor, other: Tensor, kept: Tensor, head: Head, teacher_head: Head, kind: str) -> tuple[Tensor, ...]:
    """Sum over kept rows by autograd through whole logits: value, gradients of hidden, weight and bias."""
    h = hidden.clone().requires_grad_()
    w = head.weight.detach().clone().requires_grad_()
    b = None if head.bias is None else head.bias.detach().clone().requires_grad_()
    z = h @ w[: head.vocab_size].T + (0 if b is None else b[: head.vocab_size])
    z = z * head.scale
    t = other @ teacher_head.weight.T * teacher_head.scale
    if head.softcap is not None:
        z, t = head.softcap * torch.tanh(z / head.softcap), head.softcap * torch.tanh(t / head.softcap)
    p, q = z.softmax(-1), t.softmax(-1)
    m = 0.3 * q + 0.7 * p
    per_row = {
        "reverse_kl": (p * (p / q).log()).sum(-1),
        "forward_kl": (q * (q / p).log()).sum(-1),
        "jsd": 0.3 * (q * (q / m).log()).sum(-1) + 0.7 * (p * (p / m).log()).sum(-1),
        "skew_reverse_kl": (p * (p / (0.2 * p + 0.8 * q)).log()).sum(-1),
        "skew_forward_kl": (q * (q / (0.2 * q + 0.8 * p)).log()).sum(-1),
    }[kind]
    loss = (per_row * kept).sum()
    inputs = [h, w] if b is None else [h, w, b]
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 8),
    vocab=st.integers(3, 20),
    extra=st.integers(0, 3),
    tile_rows=st.integers(1, 4),
    shape=st.sampled_from([(1.0, None, False), (0.25, None, True), (1.0, 2.0, False), (0.5, 3.0, True)]),
    data=st.data(),
)
def test_value_and_gradients(
    backend: str,
    kind: str,
    seed: int,
    n: int,
    vocab: int,
    extra: int,
    tile_rows: int,
    shape: tuple,
    data: st.DataObject,
) -> None:
    head, teacher_head = heads(seed, vocab, extra, *shape)
    g = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(n, 5, generator=g, dtype=torch.float64)
    other = torch.randn(n, 7, generator=g, dtype=torch.float64)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    tile_bytes = tile_rows * TILES_ALIVE * vocab * 8
    got = BACKENDS[backend](hidden, other, kept, head, teacher_head, Divergence(kind, 0.3, 0.2), tile_bytes)  # pyright: ignore[reportArgumentType]
    value, hidden_grad, weight_grad, *bias_grad = naive(hidden, other, kept, head, teacher_head, kind)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(got.value, value, **close)
    torch.testing.assert_close(got.hidden_grad, hidden_grad, **close)
    assert not got.hidden_grad[~kept].any()  # zero outside of the mask
    found = head.weight.grad if head.weight.grad is not None else torch.zeros_like(head.weight)
    torch.testing.assert_close(found, weight_grad, **close)
    if head.bias is not None:
        bias = head.bias.grad if head.bias.grad is not None else torch.zeros_like(head.bias)
        torch.testing.assert_close(bias, bias_grad[0], **close)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 12),
    vocab=st.integers(3, 20),
    tile_bytes=st.integers(1, 3000),
    shape=st.sampled_from([(1.0, None, False), (0.5, 3.0, True)]),
    kept=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_scorings_normalizers_change_nothing_but_the_work(
    kind: str, seed: int, n: int, vocab: int, tile_bytes: int, shape: tuple, kept: list[bool]
) -> None:
    """Weighted, over columns of rows: the same value and gradients as whole rows by autograd."""
    head, teacher_head = heads(seed, vocab, 0, *shape)
    g = torch.Generator().manual_seed(seed + 1)
    hidden, other = torch.randn(n, 5, generator=g).double(), torch.randn(n, 7, generator=g).double()
    mask, weights = torch.tensor(kept[:n]), torch.rand(n, generator=g).double()
    ids, wanted = torch.zeros(n, dtype=torch.long), frozenset({"entropy", "reverse_kl"})
    scored = measure(hidden, other, ids, head, teacher_head, wanted=wanted, tile_bytes=tile_bytes)
    assert scored.normalizers is not None
    got = fused(
        hidden,
        other,
        mask,
        head,
        teacher_head,
        Divergence(kind),  # pyright: ignore[reportArgumentType]
        tile_bytes,
        normalizers=scored.normalizers,
        weights=weights,
    )
    value, hidden_grad, weight_grad, *_ = naive(hidden, other, mask * weights, head, teacher_head, kind)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(got.value, value, **close)
    torch.testing.assert_close(got.hidden_grad, hidden_grad, **close)
    found = head.weight.grad if head.weight.grad is not None else torch.zeros_like(head.weight)
    torch.testing.assert_close(found, weight_grad, **close)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    vocab=st.integers(60, 400),
    at_once=st.integers(1, 1000),
    shape=st.sampled_from([(1.0, None, False), (0.5, 3.0, True)]),
)
def test_held_rows_may_be_several_products(
    kind: str, seed: int, n: int, vocab: int, at_once: int, shape: tuple
) -> None:
    """Without normalisers a tile's logits are made once, some columns at a time, and read again for the gradient."""
    head, teacher_head = heads(seed, vocab, 2, *shape)
    g = torch.Generator().manual_seed(seed + 1)
    hidden, other = torch.randn(n, 5, generator=g).double(), torch.randn(n, 7, generator=g).double()
    every, one = torch.ones(n, dtype=torch.bool), Divergence(kind)  # pyright: ignore[reportArgumentType]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.PRODUCT_ELEMENTS, "cpu", at_once)
        patch.setitem(tiles.BLOCK_ELEMENTS, "cpu", at_once // 2 + 1)
        got = fused(hidden, other, every, head, teacher_head, one, 1 << 20)
    value, hidden_grad, weight_grad, *_ = naive(hidden, other, every, head, teacher_head, kind)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(got.value, value, **close)
    torch.testing.assert_close(got.hidden_grad, hidden_grad, **close)
    torch.testing.assert_close(head.weight.grad, weight_grad, **close)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_weights_multiply_each_tokens_divergence(backend: str) -> None:
    head, teacher_head = heads(0, 9, 0, 1.0, None, False)
    hidden, other = torch.randn(6, 5).double(), torch.randn(6, 7).double()
    mask, weights = torch.tensor([1, 1, 0, 1, 1, 0]).bool(), torch.tensor([0.5, 2, 7, 0, 1, 7]).double()
    got = BACKENDS[backend](hidden, other, mask, head, teacher_head, Divergence("jsd", 0.3), 1, weights=weights)
    value, hidden_grad, *_ = naive(hidden, other, mask * weights, head, teacher_head, "jsd")
    torch.testing.assert_close(got.value, value)
    torch.testing.assert_close(got.hidden_grad, hidden_grad)


def test_head_gradients_add_to_what_is_there() -> None:
    head, teacher_head = heads(0, 6, 0, 1.0, None, False)
    hidden, other = torch.randn(4, 5).double(), torch.randn(4, 7).double()
    every = torch.ones(4, dtype=torch.bool)
    one = Divergence("reverse_kl")
    fused(hidden, other, every, head, teacher_head, one, 1 << 20)
    assert head.weight.grad is not None
    once = head.weight.grad.clone()
    fused(hidden, other, every, head, teacher_head, one, 1 << 20)
    torch.testing.assert_close(head.weight.grad, 2 * once)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_relative_gradient_error_in_low_precision(dtype: torch.dtype, limit: float, kind: str, known: bool) -> None:
    """Against float64 sums over the *same* rounded weights and hidden states."""
    g = torch.Generator().manual_seed(0)
    n, d, vocab = 256, 32, 300
    draw = lambda *shape: (torch.randn(*shape, generator=g) * d**-0.25).to(dtype)  # noqa: E731
    hidden, other, weight, teacher_weight = draw(n, d), draw(n, d), draw(vocab, d), draw(vocab, d)
    kept = torch.arange(n) % 2 == 0
    head, teacher_head = Head(weight.requires_grad_(), vocab), Head(teacher_weight, vocab)
    one, ids = Divergence(kind, 0.3, 0.2), torch.zeros(n, dtype=torch.long)  # pyright: ignore[reportArgumentType]
    scored = measure(hidden, other, ids, head, teacher_head, wanted=frozenset({"reverse_kl"}), tile_bytes=1 << 16)
    got = fused(
        hidden, other, kept, head, teacher_head, one, 1 << 16, normalizers=scored.normalizers if known else None
    )
    exact = replace(head, weight=weight.detach().double().requires_grad_())
    teacher_exact = replace(teacher_head, weight=teacher_weight.double())
    want = materialized(hidden.double(), other.double(), kept, exact, teacher_exact, one, 0)
    assert head.weight.grad is not None and exact.weight.grad is not None
    for mine, truth in ((got.hidden_grad, want.hidden_grad), (head.weight.grad, exact.weight.grad)):
        assert float((mine.double() - truth).norm() / truth.norm()) < limit
