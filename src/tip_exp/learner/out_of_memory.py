"""What to do where memory does not suffice: offload the teacher, make the micro-batches of a step smaller.

A step starts again with the same rollouts and random draws. Its selection is the same too, because tokens keep the
order and the micro-batch numbers of `learner.micro_batch_tokens`: only the split of sums changes. Later steps have the
smaller micro-batches as well. micro_batch_tokens.json in the run's folder, {"step": tokens}, makes a resumed run use
the same ones.

With several ranks the passes are collective: the others wait for the rank that ran out of memory, so all of them end,
and the launcher starts them again from the newest checkpoint, with smaller micro-batches.
"""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from tip_exp.config.schema import RunConfig
from tip_exp.learner.data_parallel import deal
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.learner import Learner, StepReport
from tip_exp.learner.sharding import make_sharding
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import Shard, load_pair
from tip_exp.models.micro_batch import group
from tip_exp.models.pair import ChatTokenizer, Pair, Shards
from tip_exp.models.weight_files import WeightFiles
from tip_exp.records.folder import read_budgets
from tip_exp.types import Problem, Rollout
from tip_exp.utils.errors import RestartsError, RunFailedError, first_line, is_out_of_memory, say
from tip_exp.utils.io import write_atomic

log = logging.getLogger(__name__)


class _OutOfMemory(RuntimeError):
    """Raised on every rank if one of them ran out of memory."""


def load_pair_or_offload(config: RunConfig, ranks: Ranks, device: torch.device, tokenizer: ChatTokenizer) -> Pair:
    """The pair of a run. If GPU memory does not suffice, it is loaded again with the teacher's layers on the host.

    Several ranks do so together, if one of them runs out of memory as it reads its share of a model.
    """
    roles = config.loaded_models
    can_offload = device.type == "cuda" and len(roles) == 2
    while True:
        torch.manual_seed(config.seed)  # for the initial LoRA adapters; all other draws have generators of their own
        shards = make_sharding(config, ranks, device)
        shard = shards and {role: _on_all_ranks(shard, ranks) for role, shard in shards.items()}
        try:
            packing = config.learner.packing
            return load_pair(config.pair, device, tokenizer, shard=shard, roles=roles, packing=packing)
        except (_OutOfMemory, torch.OutOfMemoryError) as error:
            is_shared = ranks.size == 1 or isinstance(error, _OutOfMemory)  # else the others wait for this rank
            if not (can_offload and is_shared and config.pair.teacher.placement == "resident"):
                raise
            log.warning("the pair does not fit", exc_info=True)
            fault = first_line(error)[:200]
        teacher = config.pair.teacher.model_copy(update={"placement": "offload"})
        config = config.model_copy(update={"pair": config.pair.model_copy(update={"teacher": teacher})})
        _free()
        if ranks.is_main:
            say(f"out of memory while the pair loads ({fault}); it is loaded with pair.teacher.placement=offload")


def _on_all_ranks(shard: Shard, ranks: Ranks) -> Shard:
    """`shard`, which is not collective; it raises _OutOfMemory on every rank if memory of any does not suffice."""

    def shard_together(module: PreTrainedModel, files: WeightFiles | None) -> Shards:
        fault, shards = "", None
        try:
            shards = shard(module, files)
        except torch.OutOfMemoryError as error:
            fault = first_line(error)
        for rank, message in enumerate(ranks.gather_objects(fault)):
            if message:
                raise _OutOfMemory(f"rank {rank}: {message}")
        assert shards is not None, "no rank has a fault"
        return shards

    return shard_together


def _free() -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class OomRetrySteps:
    """Teacher's pass and learner's step, with micro-batches that fit."""

    def __init__(self, teacher: Teacher, learner: Learner, path: Path) -> None:
        """`path`: micro_batch_tokens.json, read now; the main rank's content counts."""
        self.teacher, self.learner, self.path = teacher, learner, path
        self.configured, self.ranks = learner.config.micro_batch_tokens, learner.ranks
        self.budgets = self.ranks.broadcast(read_budgets(path))

    def __call__(self, step: int, rollouts: list[Rollout], problems: list[Problem]) -> StepReport:
        """Update number `step`.

        Raises RunFailedError if no micro-batch of one rollout fits, else, with several ranks, RestartsError.
        """
        while True:
            self.prepare(step)
            try:
                return self.learner.step(step, rollouts, self.teacher.hidden(rollouts, problems))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("step %d: out of memory", step, exc_info=True)
                fault = first_line(error)[:200]
            self._lower(step, rollouts, fault)  # now that no frame of the error holds tensors

    def prepare(self, step: int) -> None:
        """Use the micro-batches that earlier steps have found to fit."""
        tokens = min([self.configured, *(tokens for start, tokens in self.budgets.items() if start <= step)])
        if tokens != self.learner.config.micro_batch_tokens:
            config = self.learner.config.model_copy(update={"micro_batch_tokens": tokens})
            self.learner.config = self.teacher.config = config

    def _lower(self, step: int, rollouts: list[Rollout], fault: str) -> None:
        """Halve the micro-batches in use, to no less than the longest rollout, and clear what the step has left."""
        longest, used = max(len(rollout.token_ids) for rollout in rollouts), self._largest(rollouts)
        if used == longest:
            self._refuse(step, longest, fault)
        half = self.learner.config.micro_batch_tokens // 2
        lowered = self.budgets[step] = max(half if half < used else used // 2, longest)
        write_atomic(self.path, json.dumps(self.budgets) + "\n")
        to = f"micro-batches of at most {lowered} tokens (learner.micro_batch_tokens={self.configured})"
        if self.ranks.size > 1 or not self.learner.discard():
            raise RestartsError(
                f"step {step}, rank {self.ranks.rank}: out of memory ({fault}); the run resumes from the newest "
                f"checkpoint, from step {step} on with {to}"
            )
        _free()
        say(f"step {step}: out of memory; this step is repeated, and it and later steps use {to}")

    def _largest(self, rollouts: list[Rollout]) -> int:
        """Positions of the largest micro-batch of any rank, padding included."""
        config, lengths = self.learner.config, [len(rollout.token_ids) for rollout in rollouts]
        groups = [
            [lengths[index] for index in members]
            for share in deal(lengths, self.ranks.size)
            for members in group(lengths, config.micro_batch_tokens, packing=config.packing, indices=share)
        ]
        return max(sum(members) if config.packing else len(members) * max(members) for members in groups)

    def _refuse(self, step: int, longest: int, fault: str) -> NoReturn:
        raise RunFailedError(
            f"step {step}, rank {self.ranks.rank}: out of memory ({fault}) with a single rollout of {longest} tokens a "
            f"micro-batch, so a smaller learner.micro_batch_tokens (here {self.configured}) does not help. Under "
            "another name: a smaller data.max_response_tokens or learner.tile_mib, "
            "learner.activation_checkpointing=true, pair.teacher.placement=offload or more ranks"
        )
