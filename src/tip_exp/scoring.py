"""What every response token looks like to both models: full-vocabulary statistics in one pass, without gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp import moments
from tip_exp.heads import Head
from tip_exp.moments import Moments, Normalizers
from tip_exp.scores import STUDENT_STATISTICS
from tip_exp.tiles import Workspace, tiling

Statistics = dict[str, Tensor]  # name in scores.STATISTICS -> (N,)

# Columns of which only the largest logit is looked at, until it is known which groups can hold a top-k token.
TOPK_GROUP = 64


@dataclass(frozen=True, slots=True)
class Scored:
    """The wanted statistics, and the normalisers the loss takes over; None if the teacher was not projected."""

    statistics: Statistics
    normalizers: Normalizers | None


@torch.no_grad()
def measure(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    token_ids: Int[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    *,
    wanted: frozenset[str],
    tile_bytes: int,
    jsd_beta: float = 0.5,
    top_k: int = 10,
) -> Scored:
    """Statistics and normalisers of N response tokens by one product with each head.

    `student_hidden` and `teacher_hidden` are the final hidden states that predict `token_ids`. The teacher is
    projected only if a wanted statistic needs it. Beyond the tiles nothing of the vocabulary's size is held; `jsd`
    needs both normalisers before its first term, so with it a tile is whole rows.
    """
    both = bool(wanted - STUDENT_STATISTICS)
    cut = tiling(len(token_ids), student_head.vocab_size, student_head.dtype, tile_bytes, whole_rows="jsd" in wanted)
    work = Workspace(cut, student_hidden, student_head.dtype, spare=2 if "jsd" in wanted else 1, tiles=1 + both)
    k = min(top_k, student_head.vocab_size)
    found: list[_Rows] = []
    for rows in cut.rows():
        hidden, other, ids = student_hidden[rows], teacher_hidden[rows] if both else None, token_ids[rows]
        one = None
        for columns in cut.columns():
            size = len(ids), columns.stop - columns.start
            z = work.tile(0, *size)
            student_head.logits_into(z, hidden, columns)
            t = None
            if other is not None:
                t = work.tile(1, *size)
                teacher_head.logits_into(t, other, columns)
            part = _of_tile(z, t, ids, columns, wanted, k, work, jsd_beta)
            one = part if one is None else one.merged(part, k)
        assert one is not None, "a vocabulary has at least one column"
        found.append(one)
    if not found:
        nothing = torch.zeros(0, dtype=student_head.dtype, device=student_hidden.device)
        return Scored({name: nothing for name in wanted}, Normalizers(*[nothing] * 4) if both else None)
    tiles = [one.statistics(wanted) for one in found]
    statistics = {name: torch.cat([tile[name] for tile in tiles]).to(student_head.dtype) for name in wanted}
    if not both:
        return Scored(statistics, None)
    known = [moments.normalizers(one.student, one.teacher) for one in found if one.teacher is not None]
    return Scored(statistics, moments.joined(known))


@torch.no_grad()
def top_tokens(
    hidden: Float[Tensor, "n d"], head: Head, k: int, tile_bytes: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """A model's k likeliest next tokens at N positions, and their probabilities, tile by tile."""
    k = min(k, head.vocab_size)
    cut = tiling(len(hidden), head.vocab_size, head.dtype, tile_bytes, whole_rows=True)
    tiles = [head.logits(hidden[rows]).log_softmax(-1).topk(k) for rows in cut.rows()]
    if not tiles:
        nothing = torch.zeros(0, k, device=hidden.device)
        return nothing.long(), nothing
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values.exp() for tile in tiles])


def normalized_entropy(entropy: Tensor, vocab_size: int) -> Tensor:
    """H / ln V, in [0, 1]: TIP, Eq. 2."""
    return entropy / math.log(vocab_size)


@dataclass(frozen=True, slots=True)
class _Best:
    """The k largest logits among the columns seen: values and token ids, (n, k)."""

    values: Tensor
    ids: Tensor

    def merged(self, more: _Best, k: int) -> _Best:
        values, at = torch.cat([self.values, more.values], -1), torch.cat([self.ids, more.ids], -1)
        best = values.topk(min(k, values.shape[-1]))
        return _Best(best.values, at.gather(-1, best.indices))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is known of some tokens from the vocabulary columns seen so far."""

    student: Moments
    teacher: Moments | None
    sampled: tuple[Tensor, ...]  # logit of the sampled token: student's, teacher's; zero in columns without it
    best: tuple[_Best, ...]
    jsd: Tensor | None

    def merged(self, more: _Rows, k: int) -> _Rows:
        teacher = None if self.teacher is None or more.teacher is None else self.teacher.merged(more.teacher)
        sampled = tuple(a + b for a, b in zip(self.sampled, more.sampled, strict=True))
        best = tuple(a.merged(b, k) for a, b in zip(self.best, more.best, strict=True))
        return _Rows(self.student.merged(more.student), teacher, sampled, best, None)

    def statistics(self, wanted: frozenset[str]) -> Statistics:
        return dict(self._statistics(wanted))

    def _statistics(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        student, teacher = self.student, self.teacher
        if "entropy" in wanted:
            yield "entropy", student.entropy
        if "student_logprob" in wanted:
            yield "student_logprob", self.sampled[0] - student.log_normalizer
        if teacher is None:
            return
        if "teacher_entropy" in wanted:
            yield "teacher_entropy", teacher.entropy
        if "teacher_logprob" in wanted:
            yield "teacher_logprob", self.sampled[1] - teacher.log_normalizer
        if "reverse_kl" in wanted:
            yield "reverse_kl", student.kl(teacher).clamp_(min=0)  # rounding can go below
        if "forward_kl" in wanted:
            yield "forward_kl", teacher.kl(student).clamp_(min=0)
        if self.jsd is not None:
            yield "jsd", self.jsd.clamp(min=0)
        if self.best:
            ours, theirs = self.best
            shared = (ours.ids[:, :, None] == theirs.ids[:, None, :]).any(-1)
            yield "topk_overlap", shared.to(student.top.dtype).mean(-1)


def _of_tile(
    z: Tensor,
    t: Tensor | None,
    ids: Tensor,
    columns: slice,
    wanted: frozenset[str],
    k: int,
    work: Workspace,
    jsd_beta: float,
) -> _Rows:
    """One tile's contribution; overwrites the logits."""
    tiles = (z,) if t is None else (z, t)
    # What the summing overwrites is looked up first.
    sampled = tuple(_sampled(tile, ids - columns.start) for tile in tiles)
    best = tuple(_largest(tile, k, columns.start) for tile in tiles) if "topk_overlap" in wanted else ()
    student, teacher, jsd = moments.of_tile(z, t, work, jsd_beta=jsd_beta if "jsd" in wanted else None)
    return _Rows(student, teacher, sampled, best, jsd)


def _sampled(tile: Tensor, ids: Tensor) -> Tensor:
    inside = (ids >= 0) & (ids < tile.shape[-1])
    logits = tile.gather(-1, ids.clamp(0, tile.shape[-1] - 1)[:, None]).squeeze(-1)
    return torch.where(inside, logits, 0)


def _largest(tile: Tensor, k: int, start: int) -> _Best:
    """The k largest of each row: they lie in the k groups of columns whose maxima are largest, so few are sorted."""
    width = tile.shape[-1]
    k = min(k, width)
    whole = width // TOPK_GROUP
    if whole <= k:
        best = tile.topk(k)
        return _Best(best.values, best.indices + start)
    grouped = tile[:, : whole * TOPK_GROUP].unflatten(-1, (whole, TOPK_GROUP))
    groups = grouped.amax(-1).topk(k).indices
    best = grouped.gather(1, groups[:, :, None].expand(-1, -1, TOPK_GROUP)).flatten(1).topk(k)
    ids = groups.gather(-1, best.indices // TOPK_GROUP) * TOPK_GROUP + best.indices % TOPK_GROUP + start
    found = _Best(best.values, ids)
    if whole * TOPK_GROUP == width:
        return found
    return found.merged(_largest(tile[:, whole * TOPK_GROUP :], k, start + whole * TOPK_GROUP), k)
