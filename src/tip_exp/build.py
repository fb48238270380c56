"""The parts of a run: its inputs first, which refuse what can be refused, then the weights and what uses them."""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from functools import cached_property

import torch

from tip_exp.config.schema import RunConfig
from tip_exp.data.prompts import with_tools
from tip_exp.envs.sampler import episode_metrics
from tip_exp.estimate.memory_check import with_engine_share
from tip_exp.eval.verdicts import Verdicts, grade_rollouts
from tip_exp.inputs import Inputs
from tip_exp.learner.checkpoint import Checkpoint
from tip_exp.learner.data_parallel import DataParallelSampler
from tip_exp.learner.device import pick_threads
from tip_exp.learner.learner import Learner
from tip_exp.learner.model_folder import export
from tip_exp.learner.on_policy import MismatchCheck, MismatchLimits, limits_for, model_mismatch
from tip_exp.learner.out_of_memory import OomRetrySteps, load_pair_or_offload
from tip_exp.learner.selectors import make_selector, make_shadows
from tip_exp.learner.teacher import Teacher
from tip_exp.models.pair import Model
from tip_exp.records import metrics as names
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.records.result import describe_hardware, write_result
from tip_exp.records.tracker import start_trackers
from tip_exp.records.writer import RunLogger
from tip_exp.rollout.ahead import RolloutsAhead
from tip_exp.types import Problem, Rollout, Sampler, Sampling
from tip_exp.utils.errors import say
from tip_exp.utils.seeds import seed_for

CHECKED_RESPONSES, CHECKED_TOKENS = 16, 64  # responses to each prompt, and their length, that `check_engine` compares


class Parts:
    """What training and evaluation runs share: the pair, its teacher's passes, sampler, benchmarks and logger."""

    def __init__(self, config: RunConfig, folder: RunFolder, stack: ExitStack) -> None:
        self.config, self.folder, self.stack = config, folder, stack
        self.inputs = inputs = Inputs(config, folder, stack)
        self.ranks, self.device = inputs.ranks, inputs.device
        self.checkpoints, saved = inputs.checkpoints, inputs.saved
        self.pair = load_pair_or_offload(config, self.ranks, self.device, inputs.tokenizer)
        torch.set_num_threads(pick_threads(config.num_threads, self.pair))
        self.meter = Meter(self.device)
        self.teacher = Teacher(self.pair, config.learner, self.meter)
        rows, step = (saved.rows, saved.step) if saved else (None, 0)
        trackers = start_trackers(config, folder, step) if self.ranks.is_main else None
        self.logger = stack.enter_context(RunLogger(folder, trackers, rows=rows, writes=self.ranks.is_main))
        if self.ranks.is_main:
            inputs.write_prompts()

    @cached_property
    def sampler(self) -> Sampler:
        """Samples from the student, or from the teacher if the run is its evaluation. Made at first use."""
        with self.meter.span("startup"):
            return self.stack.enter_context(closing(self._make_sampler("student")))

    def evaluate(self, model: str, step: int = 0) -> dict[str, float]:
        """Accuracies of "student" or "teacher" on all benchmarks."""
        sequence_kl = self._sequence_kl if self.config.eval.measures_kl and model == "student" else None
        with ExitStack() as stack:
            if model == "teacher":
                stack.enter_context(self.teacher.offloader.on_device())
            if model == "student" or self.config.mode == "teacher":  # the teacher takes the student's place
                sampler = self.sampler
            else:
                sampler = stack.enter_context(closing(self._make_sampler(model)))
            with self.meter.span("eval"):
                evaluations = self.inputs.evaluations
                metrics = evaluations(sampler, self.logger, model=model, step=step, sequence_kl=sequence_kl)
                return self.ranks.broadcast(metrics)

    def evaluate_start(self) -> None:
        """Evaluate the student and, with `eval.teacher`, the teacher before it; log and print this as step 0."""
        if self.config.mode == "teacher":
            metrics = self.evaluate("teacher")
        else:
            teacher = self._evaluate_teacher() if self.config.eval.teacher else {}
            metrics = self.evaluate("student") | teacher
        self.log(0, metrics)
        print(names.format_accuracies(0, metrics))
        if weak := names.weak_teachers(metrics):
            say(
                f"the teacher is no better than the student on {', '.join(weak)}: see {self.folder.prompts.name} and "
                f"{self.folder.eval_rows.name} in {self.folder.root}"
            )

    def check_engine(self) -> None:
        """Raise SyncError if an engine's log-probs of some responses are not those of the weights that it was given.

        A training run checks each step instead. Every rank's engine writes responses, and every rank reads them all.
        """
        if self.inputs.backend.name != "vllm":
            return
        prompts = [*self.inputs.evaluations.first_prompts().values()] * self.ranks.size
        sampling = Sampling(CHECKED_RESPONSES, 1.0, 1.0, 0, min(CHECKED_TOKENS, self.config.eval.max_tokens))
        rollouts = self.sampler.generate(prompts, sampling, self.config.eval.seed)
        self.sampler.rest()
        mismatch = model_mismatch(self.pair.student, rollouts, self.pair, self.config.learner)
        MismatchCheck(self._mismatch_limits())(mismatch, step=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step's metrics with the seconds since the last call and the largest memory peaks of any rank."""
        seconds = self.meter.drain_seconds()
        if rollout_s := seconds.get(names.seconds("rollout")):
            metrics = metrics | {names.TOKENS_PER_S: metrics[names.RESPONSE_TOKENS] / rollout_s}
        self.logger.log(step, metrics | seconds | self.ranks.largest(self.meter.memory()))

    def finish(self) -> None:
        """Wait for the last checkpoint; write result.json, the last file of a run, and the trained model's card."""
        self.checkpoints.finish()
        if not self.ranks.is_main:
            return
        self.logger.record()
        hardware = describe_hardware(self.device, self.ranks.size)
        backend = asdict(self.inputs.backend)
        result = write_result(self.config, self.folder, self.inputs.described_data, backend, hardware)
        self.logger.finish(result)

    def _evaluate_teacher(self) -> dict[str, float]:
        """The teacher's accuracies: from the run that the launcher finished for it, else measured here."""
        if self.inputs.has_teacher_result():
            source = RunFolder(self.folder.teacher)
            return self.ranks.broadcast(self.logger.copy_teacher(source) if self.ranks.is_main else {})
        return self.evaluate("teacher")

    def _sequence_kl(self, rollouts: list[Rollout], problems: list[Problem]) -> list[float]:
        self.sampler.rest()  # the forward passes need the device's memory
        return self.teacher.sequence_kl(rollouts, problems)

    def _mismatch_limits(self) -> MismatchLimits:
        model = self.config.pair.teacher if self.config.mode == "teacher" else self.config.pair.student
        dtypes = self.inputs.backend.dtype, model.dtype, self.config.learner.compute_dtype
        return limits_for(*dtypes, **self.config.rollout.max_logprob_mismatch)

    def _make_sampler(self, model: str) -> Sampler:
        role: Model = getattr(self.pair, model)
        copies = model == "student" and self.inputs.train is not None and self.config.rollout.staleness > 0
        copy_to = self.device if copies else None
        rollout = with_engine_share(self.config, self.device, self.ranks.size)
        sampler = self.inputs.backend.make(role, self.pair, rollout, self.inputs.longest, copy_to)
        if self.ranks.size == 1 and role.shards is None:
            return sampler
        has_weights = copies or self.inputs.backend.name == "vllm"
        ranks = self.ranks.for_background_thread() if copies else self.ranks  # a copy samples while the learner gathers
        return DataParallelSampler(sampler, ranks, nullcontext if has_weights else role.gathered)


class TrainingParts(Parts):
    """The parts of a run that trains."""

    def __init__(self, config: RunConfig, folder: RunFolder, stack: ExitStack) -> None:
        super().__init__(config, folder, stack)
        assert self.inputs.train is not None, "config.mode is train"
        self.train = self.inputs.train
        self.learner = Learner(
            self.pair,
            make_selector(config),
            config.learner,
            seed=config.seed,
            meter=self.meter,
            shadows=make_shadows(config),
            keep_batch=self.logger.non_finite,
        )
        self.train_step = OomRetrySteps(self.teacher, self.learner, folder.micro_batches)
        rollout, data, samples = config.rollout, config.data, config.learner.samples_per_prompt
        self.sampling = Sampling(samples, rollout.temperature, rollout.top_p, rollout.top_k, data.max_response_tokens)
        later = limits_for(**rollout.max_logprob_mismatch) if rollout.staleness else None
        self.check_mismatch = MismatchCheck(self._mismatch_limits(), later)
        ahead = RolloutsAhead(self.generate, config.learner.num_steps, self.device) if rollout.staleness else None
        self.ahead = ahead and stack.enter_context(closing(ahead))

    @cached_property
    def generator(self) -> Sampler:
        """The sampler, or for tool tasks one whose rollouts are whole episodes."""
        assert self.inputs.train_data is not None, "config.mode is train"
        return with_tools(self.sampler, self.pair, self.inputs.train_data, self.config.agent)

    def generate(self, step: int) -> list[Rollout]:
        """`samples_per_prompt` rollouts of each prompt of a step, prompt-major."""
        prompts, _ = self.train.batch(step)
        return self.generator.generate(prompts, self.sampling, seed_for("rollout", self.config.seed, step))

    def rollouts(self, step: int) -> tuple[list[Rollout], list[Problem]]:
        """A step's rollouts and the problem of each.

        On return the sampler has released its device memory or, with rollout.staleness=1, samples the next step's.
        """
        if self.ahead is not None:
            rollouts, seconds = self.ahead.take(step)
            self.meter.add("rollout", seconds)
        else:
            with self.meter.span("rollout"):
                rollouts = self.generate(step)
            self.sampler.rest()
        return rollouts, self.train.batch(step)[1]

    def sync(self) -> None:
        """Give the sampler the updated weights; with rollout.staleness=1, after the rollouts that need the old ones."""
        if self.ahead is not None:
            with self.meter.span("wait"):
                self.ahead.wait()
        with self.meter.span("sync"):
            self.sampler.sync()

    def resume(self, saved: Checkpoint | None) -> int:
        """Restore student and optimizer from a checkpoint; returns its step, 0 without one."""
        if saved is None:
            return 0
        saved.load(self.pair.student.module, self.learner.optimizer)
        self.train_step.prepare(saved.step + 1)
        if self.ahead is not None:
            self.ahead.restore(saved.rollouts)
            self.sampler.sync()  # now: the thread would copy weights that the learner is updating
        return saved.step

    def save(self, step: int) -> None:
        """Start to write a checkpoint, once the one before is written."""
        rollouts, rows = None if self.ahead is None else self.ahead.wait(), self.logger.record()
        student, sampled_by = self.pair.student.module, self.inputs.backend.name
        self.checkpoints.save(step, student, self.learner.optimizer, sampled_by, rows, rollouts)

    def export(self) -> None:
        """Write the student as a Hugging Face folder, in place of the one before."""
        export(self.folder.model, self.pair.student.module, self.pair.tokenizer, self.ranks)

    def verdicts(self, shown: list[tuple[Rollout, Problem]]) -> Verdicts:
        """Whether some rollouts are right; empty on every rank but the main one."""
        config, is_main = self.config.data.train, self.ranks.is_main
        return grade_rollouts(config, shown, self.generator, self.pair.decode) if is_main else {}

    def rollout_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        return {
            names.RESPONSE_LEN: sum(rollout.num_response_tokens for rollout in rollouts) / len(rollouts),
            names.TRUNCATED_FRAC: sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        } | episode_metrics(self.generator)
