"""Triton's interpreter on losses/kernels.py: values and gradients of the torch path and of float64, bytes moved.

Run by test_kernels.py in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests import reference
from tests.reference import random_logits, random_pair
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from tip_exp.losses import fused, gradient_kernel, kernels, masked_loss, online_softmax
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import LOWEST, Head, LazyLogits
from tip_exp.losses.logit_gradient import LogitGradientSums
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats, _as_rows, _as_stats, tile_stats
from tip_exp.losses.tiling import GROUP, LIVE_TILES, Workspace, tiling
from tip_exp.losses.token_stats import token_stats
from tip_exp.selector.scores import STATISTICS, STUDENT_STATISTICS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes outside the tile and of NaN
EXAMPLES = settings(max_examples=5, phases=[Phase.generate])  # the interpreter takes milliseconds per program
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}
LOSS_CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
WIDTHS = st.sampled_from([1, 2, 63, 64, 65, 130, 200])


@pytest.fixture(autouse=True, scope="module")
def narrow_blocks() -> Iterator[None]:
    """64 columns a block, so that small tiles take several, and the losses use the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ROW_BLOCK", "GRAD_BLOCK"):
            patch.setattr(kernels, name, GROUP)
        patch.setattr(gradient_kernel, "GAP_BLOCK", GROUP)
        for module in (online_softmax, masked_loss):
            patch.setattr(module, "kernels", lambda _: kernels)
        yield


def torch_sums(z: Tensor, t: Tensor, group_maxima: Tensor | None = None) -> list[OnlineSoftmaxStats]:
    cut = tiling(*z.shape, z.dtype, 1 << 24, whole_rows=True)
    return tile_stats([z, t], Workspace(cut, z.dtype, z.device, num_scratch=4), group_maxima)


@pytest.mark.parametrize("dtype", CLOSE)
@EXAMPLES
@given(seed=st.integers(0, 1000), n=st.integers(1, 2), widths=st.lists(WIDTHS, min_size=1, max_size=3))
def test_sums_of_tiles_equal_those_of_whole_rows(dtype: torch.dtype, seed: int, n: int, widths: list[int]) -> None:
    vocab = sum(widths) + 1
    logits = random_logits(seed, n, vocab)
    z, t = (tensor.to(dtype) + 100 for tensor in logits)
    sums, start = None, 0
    for width in [*widths, 1]:
        columns = slice(start, start + width)
        sums, start = kernels.add_tile(sums, z[:, columns], t[:, columns], group_maxima=None), start + width
    assert sums is not None
    computed = LogNormalizers.of(*_as_stats(sums, 2))
    torch.testing.assert_close(computed, LogNormalizers.of(*torch_sums(z, t)), **CLOSE[dtype])
    p, q = (tensor.to(dtype).double().softmax(-1) for tensor in (z, t))
    for name in ("reverse_kl", "forward_kl"):
        torch.testing.assert_close(getattr(computed, name), reference.divergence(name, p, q), **CLOSE[dtype])
    entropies = torch.stack([stats.entropy for stats in _as_stats(sums, 2)])
    torch.testing.assert_close(entropies, torch.stack([-(x * x.log()).sum(-1) for x in (p, q)]), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@EXAMPLES
@given(seed=st.integers(0, 1000), n=st.integers(1, 2), widths=st.lists(WIDTHS, min_size=1, max_size=3))
def test_gradient_norms_of_tiles_equal_autograd(dtype: torch.dtype, seed: int, n: int, widths: list[int]) -> None:
    z, t = (tensor.to(dtype) for tensor in random_logits(seed, n, sum(widths)))
    z[:, 0] += 12  # p -> 1
    tiles = zip(z.split(widths, 1), t.split(widths, 1), strict=True)
    first, *rest = [LogitGradientSums.of_rows(kernels.logit_gradient_sums(*tile)) for tile in tiles]
    norm = functools.reduce(LogitGradientSums.merge, rest, first).norm
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(norm, reference.grad_norm(z, t), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("vocab", [64, 130, 200])
def test_group_maxima_are_those_of_full_groups(vocab: int) -> None:
    z, t = (tensor.float() for tensor in random_logits(0, 3, vocab))
    whole, expected = torch.full((2, 3, 5), math.nan), torch.empty(2, 3, vocab // GROUP)
    maxima = whole[:, :, 1 : 1 + vocab // GROUP]  # a view, as for a tile of columns
    kernels.add_tile(None, z, t, group_maxima=maxima)
    torch_sums(z, t, expected)
    assert maxima.equal(expected)
    assert int(whole.isnan().sum()) == 2 * 3 * (5 - vocab // GROUP)


@pytest.mark.parametrize(
    "z, t",
    [
        ([1000.0, 993, 990, 985], [1000.0, 995, 990, 985]),  # peaked rows keep their digits
        ([3.0, LOWEST, 2, 1], [1.0, LOWEST, 2, 3]),  # a token that both models exclude
        ([3e4, -3e4, 0, 1], [3e4, -3e4, 1, 0]),
        ([5.0, 5, 5, 5], [5.0, 5, 5, 5]),
        ([-1e4, -1e4, -1e4, -1e4 + 1], [-1e4, -1e4, -1e4 + 1, -1e4]),
    ],
)
def test_extreme_logits(z: list[float], t: list[float]) -> None:
    """In the first and last columns, and in lanes that hold nothing else."""
    logits = [torch.tensor([values[:2] + [values[2] - 3] * 150 + values[2:]]) for values in (z, t)]
    computed = LogNormalizers.of(*_as_stats(kernels.add_tile(None, *logits, group_maxima=None), 2))
    p, q = (tensor.double().log_softmax(-1) for tensor in logits)
    expected = {"student": logits[0].double().logsumexp(-1), "teacher": logits[1].double().logsumexp(-1)}
    expected |= {"reverse_kl": (p.exp() * (p - q)).sum(-1), "forward_kl": (q.exp() * (q - p)).sum(-1)}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(computed, name), value, rtol=1e-4, atol=1e-6, msg=name)
    for kl, gradient in (("reverse_kl", p.exp() * (p - q - expected["reverse_kl"])), ("forward_kl", p.exp() - q.exp())):
        grad = torch.empty_like(logits[0])
        kernels.kl_grad(kl, *logits, computed, None, None, out=grad)
        torch.testing.assert_close(grad.double(), gradient, rtol=1e-3, atol=1e-6, msg=kl)


def test_a_logit_that_is_nan_or_infinite_makes_the_statistics_nan() -> None:
    for bad in (math.nan, math.inf):
        z, t = (tensor.float() for tensor in random_logits(0, 3, 100))
        z[1, 70] = bad
        student, teacher = _as_stats(kernels.add_tile(None, z, t, group_maxima=None), 2)
        assert student.kl(teacher).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kl", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@EXAMPLES
@given(seed=st.integers(0, 1000), n=st.integers(1, 2), vocab=WIDTHS, weighted=st.booleans(), out=st.sampled_from("zbw"))
def test_gradients_equal_autograd(
    kl: str, softcap: float | None, seed: int, n: int, vocab: int, weighted: bool, out: str
) -> None:
    """In place (z), in another tensor whose rows are wider (w), rounded to bfloat16 (b)."""
    raw, t = random_logits(seed, n, vocab)
    raw.requires_grad_()
    z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    weights = torch.linspace(0.5, 2, n).double() if weighted else None
    value = reference.divergence(kl, z.softmax(-1), t.softmax(-1))
    (expected,) = torch.autograd.grad((value if weights is None else value * weights).sum(), raw)
    z = z.detach().clone()
    if out == "b":  # the interpreter does not convert float64 to bfloat16
        z, t, weights = z.float(), t.float(), None if weights is None else weights.float()
    normalizers = LogNormalizers.of(*torch_sums(z, t))
    target = {"z": z, "b": torch.empty(n, vocab, dtype=torch.bfloat16), "w": z.new_empty(n, vocab + 3)[:, :vocab]}[out]
    kernels.kl_grad(kl, z, t, normalizers, weights, softcap, out=target)
    close = {"rtol": 8e-3, "atol": 1e-5} if out == "b" else LOSS_CLOSE
    torch.testing.assert_close(target.double(), expected, **close)


HEADS = st.sampled_from([{}, {"scale": 0.5, "softcap": 3.0, "bias": True}])


@EXAMPLES
@given(seed=st.integers(0, 1000), n=st.integers(1, 3), vocab=st.integers(70, 200), rows=st.integers(1, 2), head=HEADS)
def test_token_stats_by_kernels(seed: int, n: int, vocab: int, rows: int, head: dict[str, Any]) -> None:
    token_ids = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
    pair = random_pair(seed, n, vocab, **head)
    options: dict[str, Any] = {"tile_bytes": rows * LIVE_TILES * vocab * 8, "jsd_beta": 0.3, "top_k": 3}
    values = token_stats(*pair, token_ids, wanted=frozenset(STATISTICS), **options).values
    expected = reference.token_statistics(*pair, token_ids, jsd_beta=0.3, k=3)
    for name in STATISTICS:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)
    alone = token_stats(*pair, token_ids, wanted=STUDENT_STATISTICS, tile_bytes=1000).values
    for name in STUDENT_STATISTICS:
        torch.testing.assert_close(alone[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("kl", ["reverse_kl", "forward_kl"])
@EXAMPLES
@given(
    seed=st.integers(0, 1000),
    kept=st.lists(st.booleans(), min_size=1, max_size=4),
    vocab=st.integers(3, 90),
    head=HEADS,
    measured=st.booleans(),
)
def test_the_loss_by_kernels(
    kl: str, seed: int, kept: list[bool], vocab: int, head: dict[str, Any], measured: bool
) -> None:
    student, teacher = random_pair(seed, len(kept), vocab, **head)
    kept_mask, weights = torch.tensor(kept), torch.linspace(0.5, 2, len(kept)).double()
    stats = token_stats(student, teacher, torch.zeros(len(kept)).long(), wanted=frozenset({"jsd"}), tile_bytes=9000)
    log_normalizers = stats.log_normalizers if measured else None
    result = fused(student, teacher, kept_mask, Divergence(kl), 3000, log_normalizers=log_normalizers, weights=weights)
    expected = reference.masked_loss(
        student, teacher, kept_mask * weights, lambda z, t: reference.divergence(kl, z.softmax(-1), t.softmax(-1))
    )
    grads = [student.head.weight] if student.head.bias is None else [student.head.weight, student.head.bias]
    computed = [torch.zeros_like(p) if p.grad is None else p.grad for p in grads]
    torch.testing.assert_close([result.value, result.hidden_grad, *computed], expected, **LOSS_CLOSE)


def test_tokens_that_both_models_exclude() -> None:
    student, teacher = random_pair(0, 3, 80, dtype=torch.float32)
    bias = torch.zeros(80)
    bias[[0, 79]] = -math.inf
    with_bias = [LazyLogits(m.hidden, Head(m.head.weight.detach(), 80, bias)) for m in (student, teacher)]
    without = [LazyLogits(m.hidden, Head(m.head.weight.detach()[1:79], 78)) for m in (student, teacher)]
    wanted = frozenset({"entropy", "reverse_kl", "forward_kl", "jsd"})
    values, expected = (
        token_stats(*pair, torch.ones(3).long(), wanted=wanted, tile_bytes=1 << 20).values
        for pair in (with_bias, without)
    )
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that interpreted kernels load and store."""
    counts = {"loaded": 0, "stored": 0}
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(np.count_nonzero(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(pointers: Any, mask: Any, *args: Any) -> Any:
        counts["loaded"] += size(pointers, mask)
        return load(pointers, mask, *args)

    def counted_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        counts["stored"] += size(pointers, mask)
        return store(pointers, value, mask, *args)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", counted_store)
    return counts


def test_bytes_moved(moved: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Per pair of float32 logits: 8 read for statistics; 8 read and 4 (bfloat16: 2) written for a gradient."""
    for name in ("ROW_BLOCK", "GRAD_BLOCK"):
        monkeypatch.setattr(kernels, name, 1024)
    n, vocab = 3, 5000
    z, t = (tensor.float() for tensor in random_logits(0, n, vocab))

    def bytes_of(launch: Any, *args: Any, **options: Any) -> tuple[int, int]:
        moved.update(loaded=0, stored=0)
        launch(*args, **options)
        return moved["loaded"], moved["stored"]

    pairs = n * vocab
    sums = 8 * 8 * n  # eight float64 numbers per row
    assert bytes_of(kernels.add_tile, None, z, t, group_maxima=None) == (8 * pairs, sums)
    assert bytes_of(kernels.add_tile, None, z, group_maxima=None) == (4 * pairs, sums)
    running = _as_rows(torch_sums(z, t))
    two_maxima_again = 2 * 8 * n
    assert bytes_of(kernels.add_tile, running, z, t, group_maxima=None) == (8 * pairs + sums + two_maxima_again, sums)
    maxima = torch.empty(2, n, vocab // GROUP)
    assert bytes_of(kernels.add_tile, None, z, t, group_maxima=maxima) == (8 * pairs, sums + 4 * maxima.numel())
    monkeypatch.setattr(gradient_kernel, "GAP_BLOCK", 1024)
    assert bytes_of(kernels.logit_gradient_sums, z, t) == (8 * pairs, 7 * 8 * n)
    row = z[:, 0].contiguous()
    assert bytes_of(kernels.mixture_sum, z, t, row, row, row) == (8 * pairs + 3 * 4 * n, 4 * n)
    normalizers = LogNormalizers.of(*torch_sums(z, t))
    programs = n * math.ceil(vocab / 1024)
    for kl, numbers in (("reverse_kl", 3), ("forward_kl", 2)):  # float64 per program
        for out, size in ((torch.empty_like(z), 4), (torch.empty(n, vocab, dtype=torch.bfloat16), 2)):
            expected = (8 * pairs + 8 * numbers * programs, size * pairs)
            assert bytes_of(kernels.kl_grad, kl, z, t, normalizers, None, None, out=out) == expected
