"""The gradient of the kept tokens' summed divergence, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.objective import ObjectiveOf
from tip_exp.learner.teacher import TeacherHidden
from tip_exp.losses import BACKENDS
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.packed_attention import activation_checkpointing
from tip_exp.models.pair import Model
from tip_exp.selector.selector import Selection
from tip_exp.utils.units import MIB


@dataclass(frozen=True, slots=True)
class Backward:
    """How gradients are computed: a key of losses.BACKENDS, and what bounds the memory."""

    tile_bytes: int
    backend: str = "fused"
    checkpointed: bool = False

    @classmethod
    def of(cls, config: LearnerConfig) -> Backward:
        """As the updates of a run with this config."""
        return cls(config.tile_mib * MIB, config.loss_backend, config.activation_checkpointing)

    def student_hidden(self, student: Model, batch: MicroBatch) -> Tensor:
        """(n, D) final hidden states of the student at the batch's response tokens."""
        checkpointed = self.checkpointed and torch.is_grad_enabled()
        with activation_checkpointing(student.module) if checkpointed else nullcontext():
            return student.hidden(batch)

    def __call__(
        self,
        student: Model,
        teacher: Head,
        batches: Sequence[MicroBatch],
        teacher_hidden: TeacherHidden | Sequence[Tensor],
        selection: Selection,
        objective_of: ObjectiveOf,
        *,
        reused_graph: Tensor | None = None,
        log_normalizers: Sequence[LogNormalizers | None] = (),
        span: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Tensor:
        """Add the gradient of this rank's kept tokens, times their weights, to `.grad`.

        Returns the weighted sum of their divergences, nats, float64, ().

        `selection` is of the tokens of all micro-batches in order; `teacher_hidden` has a tensor (n, E) for each of
        them, and `log_normalizers` for the first ones. `reused_graph`: the student's hidden states of the only
        micro-batch, with their graph. Every rank makes the call with as many micro-batches as the others.
        """
        assert len(batches) == len(teacher_hidden), "a tensor per micro-batch"
        total = torch.zeros((), dtype=torch.float64, device=student.head.weight.device)
        stop, is_alone = 0, Ranks().size == 1
        for i, batch in enumerate(batches):
            start, stop = stop, stop + batch.num_tokens
            part = selection.at(slice(start, stop))
            nothing_kept = not part.kept_mask.any()
            if nothing_kept and is_alone:
                continue
            hidden = self.student_hidden(student, batch) if reused_graph is None else reused_graph
            if nothing_kept:  # the backward pass of a sharded model needs every rank
                hidden.backward(torch.zeros_like(hidden))
                continue
            with span():
                result = BACKENDS[self.backend](
                    LazyLogits(hidden.detach(), student.head),
                    LazyLogits(teacher_hidden[i], teacher),
                    part.kept_mask,
                    objective_of(batch.token_ids),
                    self.tile_bytes,
                    log_normalizers=log_normalizers[i] if i < len(log_normalizers) else None,
                    weights=None if part.weights is None else part.weights.to(student.head.dtype),
                )
            hidden.backward(result.hidden_grad)
            total += result.value
        return total
