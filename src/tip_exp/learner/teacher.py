"""The teacher's part of a step: final hidden states at every response token, kept in host memory until used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.data_parallel import share_batches
from tip_exp.learner.distributed import ALONE, Ranks
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.stop_class import merge_ids
from tip_exp.losses.token_stats import check_ids, token_stats
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.pair import Pair
from tip_exp.models.privileged import align_teacher_hidden, with_prompt
from tip_exp.models.teacher_offload import TeacherOffloader
from tip_exp.records.meter import Meter
from tip_exp.types import Problem, Rollout
from tip_exp.utils.units import MIB


class TeacherHidden:
    """One (n, E) tensor per micro-batch, in order. CUDA tensors wait in pinned host memory; reading copies them back.

    Hidden states take far less memory than logits: E numbers a token instead of V.
    """

    def __init__(self, hidden_states: Iterable[Float[Tensor, "n e"]]) -> None:
        self._held: list[tuple[Tensor, torch.device]] = []
        for hidden in hidden_states:
            device = hidden.device
            if hidden.is_cuda:
                pinned = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
                hidden = pinned.copy_(hidden, non_blocking=True)
            self._held.append((hidden, device))

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Float[Tensor, "n e"]:
        hidden, device = self._held[index]
        return hidden.to(device, non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


class Teacher:
    """The frozen teacher of a pair. With placement `offload` its backbone is on the device only during its passes."""

    def __init__(self, pair: Pair, config: LearnerConfig, meter: Meter) -> None:
        self.pair, self.config, self.meter, self.ranks = pair, config, meter, Ranks()
        model = pair.teacher
        placement = pair.placement if model.shards is None else "resident"  # shards are offloaded by their own policy
        self.offloader = TeacherOffloader(model.module, model.loaded_head, placement, pair.student.module.device)

    @torch.no_grad()
    def hidden(
        self, rollouts: list[Rollout], problems: list[Problem] | None = None, *, shared: bool = True
    ) -> TeacherHidden:
        """Hidden states that predict the response tokens, one tensor per micro-batch of `split(rollouts)`.

        `problems[i]` is the problem of `rollouts[i]`; needed only if the teacher reads a privileged prompt. `shared`:
        each rank reads its share; otherwise every rank reads all.
        """
        with self.meter.span("teacher"):
            return self._hidden(rollouts, problems, self.ranks if shared else ALONE)

    def _hidden(
        self, rollouts: list[Rollout], problems: list[Problem] | None, ranks: Ranks, *, evaluating: bool = False
    ) -> TeacherHidden:
        batches = split(rollouts, self.pair, self.config, ranks)
        with self.offloader.on_device(), self.pair.teacher.whole():
            if self.pair.privileged is None:
                return TeacherHidden(self.pair.teacher.hidden(batch) for batch in batches)
            assert problems is not None, "privileged prompts are made from the problems"
            prompts = [self.pair.privileged_ids(problem, evaluating=evaluating) for problem in problems]
            privileged = [with_prompt(rollout, prompt) for prompt, rollout in zip(prompts, rollouts, strict=True)]
            teacher_batches = split(privileged, self.pair, self.config, ranks, dealt_by=rollouts)
            hidden_states = [self.pair.teacher.hidden(batch) for batch in teacher_batches]
            return TeacherHidden(align_teacher_hidden(batches, teacher_batches, hidden_states))

    @torch.no_grad()
    def sequence_kl(self, rollouts: list[Rollout], problems: list[Problem]) -> list[float]:
        """KL(student || teacher) summed over the response tokens of each rollout, nats; a step's rollouts at a time."""
        at_once = self.config.prompts_per_step * self.config.samples_per_prompt
        sums = torch.zeros(len(rollouts), dtype=torch.float64)
        with self.pair.student.whole(), self.pair.teacher.whole():
            for start in range(0, len(rollouts), at_once):
                chunk = slice(start, start + at_once)
                self._add_sequence_kl(sums[chunk], rollouts[chunk], problems[chunk])
        self.ranks.sum_([sums])
        return sums.tolist()

    def _add_sequence_kl(self, sums: Tensor, rollouts: list[Rollout], problems: list[Problem]) -> None:
        """Add the KL of this rank's tokens to `sums`, (number of rollouts,)."""
        batches = split(rollouts, self.pair, self.config, self.ranks)
        hidden_states = self._hidden(rollouts, problems, self.ranks, evaluating=True)
        for batch, teacher_hidden in zip(batches, hidden_states, strict=True):
            student = LazyLogits(self.pair.student.hidden(batch), self.pair.student.head)
            teacher = LazyLogits(teacher_hidden, self.pair.teacher.head)
            wanted, tile_bytes = frozenset({"reverse_kl"}), self.config.tile_mib * MIB
            stats = token_stats(student, teacher, batch.token_ids, wanted=wanted, tile_bytes=tile_bytes)
            sums.index_add_(0, batch.rollout.cpu(), stats.values["reverse_kl"].double().cpu())


def split(
    rollouts: list[Rollout],
    pair: Pair,
    config: LearnerConfig,
    ranks: Ranks,
    dealt_by: list[Rollout] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of a step on the student's device; the same rollouts always give the same batches.

    Raises ValueError for an id that only one of the models has.
    """
    budget, packing = config.micro_batch_tokens, config.packing
    batches = share_batches(rollouts, ranks, budget, pair.pad_id, packing=packing, dealt_by=dealt_by)
    for batch in batches:
        check_ids(batch.input_ids, pair.vocab_size)
    return to_pair(batches, pair)


def to_pair(batches: Iterable[MicroBatch], pair: Pair) -> list[MicroBatch]:
    """`batches` on the student's device; target ids in `pair.stop_class` become its first id, as in the heads."""
    if pair.stop_class:
        batches = [replace(batch, token_ids=merge_ids(batch.token_ids, pair.stop_class)) for batch in batches]
    return [batch.to(pair.student.module.device) for batch in batches]
