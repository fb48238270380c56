"""Gradient norms at the logits against autograd in float64 and formulas in extended precision; any tiles, p -> 1."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from tests.reference import random_logits
from torch import Tensor

from tip_exp.losses.logit_gradient import LogitGradientSums
from tip_exp.losses.online_softmax import add_tile
from tip_exp.losses.tiling import Workspace, tiling

VOCAB = 151_936


def streamed_norm(z: Tensor, t: Tensor, edges: list[int]) -> Tensor:
    """From tiles of the columns between the edges."""
    cut = tiling(*z.shape, z.dtype, 1 << 24, whole_rows=True)
    workspace = Workspace(cut, z.dtype, z.device, num_scratch=5)
    sums = []
    for start, stop in itertools.pairwise(edges):
        tiles = [logits[:, start:stop].contiguous() for logits in (z, t)]
        sums = add_tile(sums, tiles, workspace, with_gradient=True)
    assert sums[0].gradient is not None
    return sums[0].gradient.norm


def extended_norm(z: Tensor, t: Tensor) -> Tensor:
    """|p (log p/q - KL)| with 64-bit mantissas: float64 loses the digits of log p where p -> 1."""
    logp, logq = (x.numpy().astype(np.longdouble) for x in (z, t))
    logp, logq = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (logp, logq))
    p = np.exp(logp)
    kl = (p * (logp - logq)).sum(-1, keepdims=True)
    return torch.from_numpy(np.sqrt(np.square(p * (logp - logq - kl)).sum(-1)).astype(np.float64))


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 5),
    vocab=st.integers(2, 30),
    split_at=st.lists(st.integers(1, 29), max_size=3),
    offset=st.floats(-200, 200),
    peak=st.floats(0, 12),
    ties=st.booleans(),
)
def test_any_split_of_the_vocabulary_gives_the_norm_of_autograd(
    seed: int, n: int, vocab: int, split_at: list[int], offset: float, peak: float, ties: bool
) -> None:
    z, t = random_logits(seed, n, vocab)
    if ties:
        z = z.round()
    z, t = z + offset, t - offset
    z[:, vocab // 2] += peak
    edges = [0, *sorted({column for column in split_at if column < vocab}), vocab]
    torch.testing.assert_close(streamed_norm(z, t, edges), reference.grad_norm(z, t), rtol=1e-8, atol=1e-13)


def logits_of(kind: str) -> tuple[Tensor, Tensor]:
    """Three rows, float32."""
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, VOCAB, generator=g) for _ in range(2))
    columns = torch.tensor([0, 77_777, VOCAB - 1])
    rows = torch.arange(3)
    if kind == "near":  # teacher and student almost agree
        t = z + 1e-3 * t
    if kind == "peaked":  # 1 - p = 2e-3, 2e-6, 3e-10
        z[rows, columns] = torch.tensor([18.0, 25, 34])
    if kind == "agreed":  # so is the teacher
        z[rows, columns], t[rows, columns] = torch.tensor([18.0, 25, 34]), 30.0
    if kind == "outlier":  # no token is likely, and u is far from its mean at the likeliest alone
        z, t = 0.01 * z, 0.01 * z + 1e-3 * t
        t[rows, z.argmax(-1)] += 5
    return (z, t + 3) if kind != "wide" else (10 * z, 10 * t)


@pytest.mark.parametrize("kind", ["random", "near", "wide", "peaked", "agreed", "outlier"])
@pytest.mark.parametrize("edges", [[0, VOCAB], [0, 1024, 77_777, 150_000, VOCAB]])
def test_float32_agrees_at_a_real_vocabulary(kind: str, edges: list[int]) -> None:
    z, t = logits_of(kind)
    expected = extended_norm(z, t)
    if kind not in ("peaked", "agreed"):
        torch.testing.assert_close(reference.grad_norm(z, t), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(streamed_norm(z, t, edges), expected, rtol=1e-5, atol=0)


def test_equal_models_have_no_gradient() -> None:
    z, _ = random_logits(0, 4, 50)
    assert streamed_norm(z.float(), z.float(), [0, 7, 50]).tolist() == [0] * 4


def test_two_tokens_by_hand() -> None:
    """p = 1/2 each, log p/q = 0 and ln 3 up to a constant: delta = 1/2 (-+ ln 3 / 2), of norm ln 3 / sqrt 8."""
    z, t = torch.zeros(1, 2).double(), torch.tensor([[0.0, -np.log(3.0)]]).double()
    for edges in ([0, 2], [0, 1, 2]):
        torch.testing.assert_close(streamed_norm(z, t, edges), torch.tensor([np.log(3) / 8**0.5]).double())


def test_the_order_of_merging_does_not_matter() -> None:
    z, t = random_logits(1, 3, 24)
    cut = tiling(3, 6, z.dtype, 1 << 20, whole_rows=True)
    workspace = Workspace(cut, z.dtype, z.device, num_scratch=5)
    parts: list[LogitGradientSums] = []
    for columns in (slice(i, i + 6) for i in range(0, 24, 6)):
        (stats, _) = add_tile([], [z[:, columns], t[:, columns]], workspace, with_gradient=True)
        assert stats.gradient is not None
        parts.append(stats.gradient)
    expected = reference.grad_norm(z, t)
    for order in itertools.permutations(parts):
        norm = functools.reduce(LogitGradientSums.merge, order).norm
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
