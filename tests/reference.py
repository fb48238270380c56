"""Naive reference implementations that tests compare the package with: whole logits, float64, autograd, plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from tip_exp.learner.learner import StepReport
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout

# --- losses and statistics -------------------------------------------------------------------------------------------

DIVERGENCE_NAMES = [
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_reverse_kl",
    "skew_forward_kl",
    "tv",
    "sqrt_kl",
    "clipped_kl",
]


def random_logits(seed: int, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits (rows, vocab), float64, standard deviation 3."""
    g = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(rows, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return z, t


def random_pair(
    seed: int,
    n: int,
    vocab: int,
    *,
    extra: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[LazyLogits, LazyLogits]:
    """Student (width 5) and teacher (width 7) at n tokens; `extra` rows of the student's head exceed the vocabulary."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weight, teacher_weight = draw(vocab + extra, 5).requires_grad_(), draw(vocab, 7)
    student_bias = draw(vocab + extra).requires_grad_() if bias else None
    student = LazyLogits(draw(n, 5), Head(weight, vocab, student_bias, scale, softcap))
    return student, LazyLogits(draw(n, 7), Head(teacher_weight, vocab, None, 1.0, softcap))


def whole_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """(N, V) by the formula in `Head`, from float64 copies of its parameters."""
    logits = hidden.double() @ weight[: head.vocab_size].double().T
    if bias is not None:
        logits = logits + bias[: head.vocab_size].double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def divergence(
    name: str, p: Tensor, q: Tensor, jsd_beta: float = 0.5, skew: float = 0.1, kl_clip: float = 1.0
) -> Tensor:
    """Of the student's probabilities p and the teacher's q, both (..., V), summed over the last axis."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * torch.log(a / b)).sum(-1)

    m = jsd_beta * q + (1 - jsd_beta) * p
    return {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jsd": jsd_beta * kl(q, m) + (1 - jsd_beta) * kl(p, m),
        "skew_reverse_kl": kl(p, skew * p + (1 - skew) * q),
        "skew_forward_kl": kl(q, skew * q + (1 - skew) * p),
        "tv": torch.where(p > q, p - q, q - p).sum(-1) / 2,
        "sqrt_kl": (kl(p, q) + 0.01).sqrt() - 0.1,
        "clipped_kl": torch.where(kl(p, q) > kl_clip, kl_clip, kl(p, q)),
    }[name]


def top_k_divergence(
    name: str, rest: str, support: str, k: int, z: Tensor, t: Tensor, jsd_beta: float = 0.5, skew: float = 0.1
) -> Tensor:
    """`estimators.TopK` row by row from logits (n, V): (n,)."""
    values = []
    for p, q in zip(z.softmax(-1), t.softmax(-1), strict=True):
        ranked = sorted(range(len(p)), key=(p if support == "student" else q).tolist().__getitem__, reverse=True)
        inside, outside = ranked[:k], ranked[k:]
        p_events, q_events = p[inside], q[inside]
        if rest == "renormalize":
            p_events, q_events = p_events / p_events.sum(), q_events / q_events.sum()
        if rest == "tail" and outside:
            p_events = torch.cat([p_events, p[outside].sum()[None]])
            q_events = torch.cat([q_events, q[outside].sum()[None]])
        values.append(divergence(name, p_events, q_events, jsd_beta, skew))
    return torch.stack(values)


def one_class(p: Tensor, ids: Sequence[int]) -> Tensor:
    """Probabilities (n, V) with the tokens `ids` as one event, the last: (n, V - len(ids) + 1)."""
    others = [i for i in range(p.shape[1]) if i not in ids]
    return torch.cat([p[:, others], p[:, list(ids)].sum(-1, keepdim=True)], -1)


def masked_loss(student: LazyLogits, teacher: LazyLogits, token_weights: Tensor, per_token) -> list[Tensor]:
    """[sum of token_weights (N,) x per_token(z, t) (N,), its gradients at hidden, head weight and, if any, head bias].

    By autograd in float64 through whole logits z, t (N, V). The gradient is that of per_token's value.
    """
    head = student.head
    hidden, weight = (x.detach().double().requires_grad_() for x in (student.hidden, head.weight))
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_()
    z = whole_logits(hidden, weight, bias, head)
    t = whole_logits(teacher.hidden, teacher.head.weight, teacher.head.bias, teacher.head).detach()
    loss = (per_token(z, t) * token_weights).sum()
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def grad_norm(z: Tensor, t: Tensor) -> Tensor:
    """Norm of the gradient of KL(p || q) at the student's logits z (n, V), by autograd in float64: (n,)."""
    z, t = z.detach().double().requires_grad_(), t.detach().double()
    logp = z.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp() * (logp - t.log_softmax(-1))).sum(), z)
    return gradient.norm(dim=-1)


def token_statistics(
    student: LazyLogits, teacher: LazyLogits, token_ids: Tensor, jsd_beta: float, k: int, ids: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Every name in scores.STATISTICS -> (N,), float64; with `ids` of the vocabulary of `one_class`."""
    z, t = (whole_logits(x.hidden, x.head.weight, x.head.bias, x.head).detach() for x in (student, teacher))
    if ids:
        order = [i for i in range(z.shape[1]) if i not in ids]
        token_ids = torch.tensor([len(order) if i in ids else order.index(i) for i in token_ids.tolist()])
        z, t = (one_class(x.softmax(-1), ids).log() for x in (z, t))
    p, q = z.softmax(-1), t.softmax(-1)
    rows = torch.arange(len(token_ids))
    overlap = [
        len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())) / k for a, b in zip(p, q, strict=True)
    ]
    return {
        "entropy": -(p * p.log()).sum(-1),
        "teacher_entropy": -(q * q.log()).sum(-1),
        "reverse_kl": divergence("reverse_kl", p, q),
        "forward_kl": divergence("forward_kl", p, q),
        "grad_norm": grad_norm(z, t),
        "jsd": divergence("jsd", p, q, jsd_beta),
        "student_logprob": p[rows, token_ids].log(),
        "teacher_logprob": q[rows, token_ids].log(),
        "topk_overlap": torch.tensor(overlap, dtype=torch.float64),
        **top_token_statistics(p, q, token_ids),
    }


def top_token_statistics(p: Tensor, q: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    """teacher_mass_topk, teacher_rank and ier from probabilities (N, V): (N,)."""
    rows = list(zip(p, q, token_ids.tolist(), strict=True))
    return {
        "teacher_mass_topk": torch.stack([b[a.topk(min(16, len(a))).indices].sum() for a, b, _ in rows]),
        "teacher_rank": torch.stack([(b > b[a.argmax()]).sum().double() for a, b, _ in rows]),
        "ier": torch.tensor([ier(*row) for row in rows], dtype=torch.float64),
    }


def ier(p: Tensor, q: Tensor, token: int, k: int = 16) -> float:
    """IER (2609.24432) at one position, with loops over the union of both top-k sets and the sampled token."""
    k = min(k, len(p))
    support = sorted({token, *p.topk(k).indices.tolist(), *q.topk(k).indices.tolist()})
    p_sum, q_sum = sum(float(p[v]) for v in support), sum(float(q[v]) for v in support)
    ps = [float(p[v]) / p_sum for v in support]
    rs = [max(-30.0, min(30.0, math.log(a / (float(q[v]) / q_sum)))) for a, v in zip(ps, support, strict=True)]
    mean = sum(a * r for a, r in zip(ps, rs, strict=True))
    signal = sum(a * (r - mean) ** 2 for a, r in zip(ps, rs, strict=True))
    ls = [1 / a - 1 for a in ps]
    baseline = sum(a * r * w for a, r, w in zip(ps, rs, ls, strict=True)) / sum(
        a * w for a, w in zip(ps, ls, strict=True)
    )
    second = sum(a * (r - baseline) ** 2 * w for a, r, w in zip(ps, rs, ls, strict=True))
    return signal / max(second - signal, 1e-8)


# --- selection -------------------------------------------------------------------------------------------------------


def budget(size: int, retention: float) -> int:
    """retention x size, rounded down."""
    return math.floor(size * retention + 1e-9)


def keep_top(keys: list[float], groups: list[int], retention: float) -> list[bool]:
    """In each group the `budget` tokens of the highest key, ties to the earlier token, by sorting in Python."""
    kept = [False] * len(keys)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        for i in sorted(members, key=lambda i: (-keys[i], i))[: budget(len(members), retention)]:
            kept[i] = True
    return kept


# --- learner: one step -----------------------------------------------------------------------------------------------


def step_by_autograd(
    pair: Pair, rollouts: list[Rollout], report: StepReport, *, average: str, weight: str = "none"
) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of a step: each rollout alone, whole logits, reverse KL averaged over the kept tokens.

    average "rollout": a mean in each rollout that has kept tokens, then over these rollouts; "token": over all tokens.
    """
    pair.student.module.zero_grad()
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for i, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        z = pair.student.module(ids).logits[0, positions]
        with torch.no_grad():
            t = pair.teacher.module(ids).logits[0, positions]
        logp, logq = z.log_softmax(-1), t.log_softmax(-1)
        rows = report.tokens.rollout == i
        order = report.tokens.position[rows].argsort()
        weights = report.selection.kept_mask[rows][order].double()
        if weight == "score":
            weights = weights * report.selection.score[rows][order].double().clamp(min=0)
        if weight == "inverse_gradient":
            weights = weights / (grad_norm(z, t) + 0.1)
        if weight == "sqrt":
            weights = weights / (grad_norm(z, t) + 0.05).sqrt()
        if average == "rollout" and weights.sum() > 0:
            weights = weights / weights.sum()
        total = total + ((logp.exp() * (logp - logq)).sum(-1) * weights).sum()
        mass += float(weights.sum())
    (total / mass).backward()
    named = pair.student.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, float(total.detach()) / mass


# --- eval ------------------------------------------------------------------------------------------------------------


def expected_maximum_of_draws(samples: list[float]) -> float:
    """Mean of the maximum over all k^k ways to draw k times from k samples with replacement."""
    draws = list(itertools.product(samples, repeat=len(samples)))
    return sum(map(max, draws)) / len(draws)


def pass_by_subsets(right: list[bool], j: int) -> float:
    """Share of the subsets of j responses that hold a right one."""
    subsets = list(itertools.combinations(right, j))
    return sum(map(any, subsets)) / len(subsets)


def majority(values: list[Fraction]) -> Fraction:
    """The most frequent value, the earliest of several."""
    return max(values, key=lambda value: (values.count(value), -values.index(value)))


# --- report ----------------------------------------------------------------------------------------------------------


def anova_variances(table: list[list[float]]) -> tuple[float, float, float]:
    """V_problems, V_seeds and V_residual of the mean of a (seeds, problems) table: mean squares over its size."""
    num_seeds, num_problems = len(table), len(table[0])
    size = num_seeds * num_problems
    grand = sum(map(sum, table)) / size
    of_seeds = [sum(row) / num_problems for row in table]
    of_problems = [sum(row[j] for row in table) / num_seeds for j in range(num_problems)]
    problems = num_seeds * sum((mean - grand) ** 2 for mean in of_problems) / (num_problems - 1)
    seeds = num_problems * sum((mean - grand) ** 2 for mean in of_seeds) / (num_seeds - 1)
    residual = sum(
        (table[i][j] - of_seeds[i] - of_problems[j] + grand) ** 2 for i in range(num_seeds) for j in range(num_problems)
    ) / ((num_seeds - 1) * (num_problems - 1))
    return problems / size, seeds / size, residual / size
