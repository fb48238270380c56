"""What a run reads before it loads weights. What can be refused is refused here: memory, data, tokenizers, prompts."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, redirect_stdout
from functools import partial
from io import StringIO

from tip_exp.config.schema import RunConfig
from tip_exp.data.contamination import describe_data
from tip_exp.data.load import load
from tip_exp.data.training_set import TrainingSet
from tip_exp.estimate.memory_check import check_memory
from tip_exp.eval.evaluate import Evaluations
from tip_exp.learner.checkpoint import Checkpoint, Checkpoints
from tip_exp.learner.device import pick_device
from tip_exp.learner.distributed import start
from tip_exp.learner.sharding import lowered_dtype
from tip_exp.models.load import check_context
from tip_exp.models.sources import load_tokenizer
from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.records.writer import missing_rows
from tip_exp.rollout.backends import choose
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import write_atomic


class Inputs:
    """Device, sampling backend, data, rendered prompts and newest checkpoint of a run."""

    def __init__(self, config: RunConfig, folder: RunFolder, stack: ExitStack) -> None:
        self.config, self.folder, trains = config, folder, config.mode == "train"
        self.device = pick_device(config.device)
        # On CUDA there is always a group with gloo: checkpoints need gloo, and vLLM would start a group without it.
        needs_group = lowered_dtype(config) is not None or self.device.type == "cuda"
        self.ranks = stack.enter_context(start(self.device, alone=needs_group))
        if not self.ranks.is_main:
            stack.enter_context(redirect_stdout(StringIO()))  # prints are the main rank's
        student_dtype = config.pair.student.dtype if lowered_dtype(config) is None else config.learner.compute_dtype
        self.backend = choose(config.rollout, self.device, student_dtype)
        print(self.backend)
        if trains and self.backend.name == "vllm" and os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
            raise ConfigError(
                "VLLM_BATCH_INVARIANT: vLLM would replace operators of this process, which the learner needs with "
                "their gradients; unset it"
            )
        check_memory(config, self.device, self.backend.name)
        self.train_data = load(config.data.train) if trains else None
        eval_data = {name: load(dataset, f"eval.benchmarks.{name}") for name, dataset in config.eval.benchmarks.items()}
        # for result.json, which the main rank writes
        self.described_data = describe_data(config, self.train_data, eval_data) if self.ranks.is_main else {}
        self.tokenizer = load_tokenizer(config.pair)
        self.train = TrainingSet(config, self.tokenizer, self.train_data) if self.train_data else None
        self.evaluations = Evaluations(config.eval, eval_data, self.tokenizer, config.agent, grades=self.ranks.is_main)
        longest = self.evaluations.longest
        if config.eval.measures_kl:
            longest = max(longest, self.evaluations.longest_privileged())
        check_context(config, longest)
        limit = config.rollout.vllm.max_model_len
        if self.backend.name == "vllm" and limit is not None and self.longest > limit:
            raise ConfigError(
                f"rollout.vllm.max_model_len={limit}, but the longest prompt and response take {self.longest} tokens; "
                "raise it, or lower data.max_response_tokens or eval.max_tokens"
            )
        self.checkpoints = Checkpoints(folder.checkpoints, self.ranks, folder.check_held)
        self.saved = self.checkpoints.newest(partial(missing_rows, folder)) if trains else None
        if self.saved is None and numbered_checkpoints(folder.checkpoints):
            print(f"no checkpoint in {folder.checkpoints} is whole; the run starts again at step 0")
        if self.saved is not None:
            self.check_saved(self.saved)
        self._check_teacher()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response that are sampled."""
        data = self.config.data
        training = data.max_prompt_tokens + data.max_response_tokens if self.train else 0
        return max(self.evaluations.longest, training)

    def has_teacher_result(self) -> bool:
        """Whether the launcher has linked a finished evaluation of the teacher. Collective."""
        return self.ranks.broadcast(self.folder.teacher.exists())

    def check_saved(self, saved: Checkpoint) -> None:
        """Raise ConfigError if another backend has sampled the rollouts before the checkpoint."""
        if saved.backend != self.backend.name:
            raise ConfigError(
                f"{saved.path}: its rollouts were sampled by {saved.backend}, but here rollout.backend is "
                f"{self.backend.name} ({self.backend.reason}); resume where {saved.backend} is available, or "
                "start a run under another name"
            )

    def write_prompts(self) -> None:
        """Write the first prompt of each use as the models get it, so that a wrong template is seen at a glance."""
        prompts = self.train.first_prompts(self.tokenizer) if self.train else {}
        prompts |= self.evaluations.first_prompts()
        rendered = {use: self.tokenizer.decode(ids, with_special=True) for use, ids in prompts.items()}
        write_atomic(self.folder.prompts, json.dumps(rendered, indent=2, ensure_ascii=False) + "\n")

    def _check_teacher(self) -> None:
        """Raise ConfigError if the teacher is to be evaluated here and the backend cannot do it."""
        evaluates = self.config.eval.teacher and self.config.mode != "teacher" and self.saved is None
        if evaluates and self.backend.name == "vllm" and not self.has_teacher_result():
            raise ConfigError(
                "eval.teacher=true with vLLM needs a second engine, in a run of its own that tip-exp starts; start "
                "this run with tip-exp, or set eval.teacher=false"
            )
