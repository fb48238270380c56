"""A few batches of a config, each what one step of its run would train on, and gradients of their tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from tip_exp.api.select import make_selector as preset
from tip_exp.build import TrainingParts
from tip_exp.config.presets import selector_options
from tip_exp.config.schema import RunConfig
from tip_exp.learner.backward import Backward
from tip_exp.learner.checkpoint import Checkpoints
from tip_exp.learner.data_parallel import StepTokens
from tip_exp.learner.distributed import ALONE
from tip_exp.learner.influence import Direction, gradient, influence
from tip_exp.learner.objective import make_objective
from tip_exp.learner.selectors import draws, make_selector
from tip_exp.learner.teacher import TeacherHidden, split
from tip_exp.losses.token_stats import Statistics
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.records.folder import RunFolder
from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Selection, Selector, Tokens
from tip_exp.types import Problem, Rollout
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.units import MIB

CONFIGURED = " (config)"


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one step with their statistics, in the order of `tokens`, as its selector gets them."""

    step: int
    rollouts: list[Rollout]
    problems: list[Problem]
    micro_batches: list[MicroBatch]
    teacher_hidden: TeacherHidden
    tokens: Tokens
    statistics: Statistics


class Probe:
    """A config's pair, data and sampler, to read batches and to measure gradients; nothing is trained."""

    def __init__(self, parts: TrainingParts, trained_steps: int) -> None:
        self.parts, self.config, self.trained_steps = parts, parts.config, trained_steps
        self._tile_bytes = parts.config.learner.tile_mib * MIB

    def read(self, number: int) -> Batch:
        """Batch `number` (from 0) after the steps that the student was trained for."""
        parts, config, step = self.parts, self.config, self.trained_steps + 1 + number
        _, problems = parts.train.batch(step)
        rollouts = parts.generate(step)
        parts.sampler.rest()
        batches = split(rollouts, parts.pair, config.learner, ALONE)
        teacher_hidden = parts.teacher.hidden(rollouts, problems)
        scored, _ = parts.learner.token_stats(batches, teacher_hidden, frozenset(STATISTICS), keep_graph=False)
        statistics = {name: torch.cat([part.values[name] for part in scored]).cpu() for name in STATISTICS}
        budget, packing = config.learner.micro_batch_tokens, config.learner.packing
        tokens = StepTokens.of(rollouts, ALONE, budget, packing=packing).tokens
        return Batch(step, rollouts, problems, batches, teacher_hidden, tokens, statistics)

    def gradient(self, batch: Batch, selection: Selection) -> Direction:
        """The gradient of the kept tokens' weighted mean divergence."""
        student, teacher = self.parts.pair.student, self.parts.pair.teacher
        objective_of = make_objective(self.config.learner, batch.statistics)
        batches = batch.micro_batches, batch.teacher_hidden
        return gradient(Backward.of(self.config.learner), student, teacher.head, *batches, selection, objective_of)

    def influence(self, batch: Batch, direction: Direction) -> Tensor:
        """<g_n, direction> of every token, (N,), float64, in host memory."""
        student, teacher = self.parts.pair.student, self.parts.pair.teacher
        objective_of = make_objective(self.config.learner, batch.statistics)
        batches = batch.micro_batches, batch.teacher_hidden
        return influence(student, teacher.head, *batches, direction, objective_of, self._tile_bytes).cpu()

    def select(self, selector: Selector, batch: Batch) -> Selection:
        """What the selector keeps of a batch, with the draws of a run's step."""
        return selector(batch.statistics, batch.tokens, draws(self.config.seed, batch.step))


@contextmanager
def scratch_parts(config: RunConfig) -> Iterator[TrainingParts]:
    """The parts of a run in one process, with whole weights, no tracker, and a folder that is removed afterwards."""
    changes = {
        "learner": config.learner.model_copy(update={"replicas": 1}),
        "eval": config.eval.model_copy(update={"teacher": False}),
    }
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        scratch = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield TrainingParts(config.untracked().model_copy(update=changes), scratch, stack)


@contextmanager
def opened(config: RunConfig, run: Path | None = None) -> Iterator[Probe]:
    """The probe of a config; `run`: folder of a run, whose newest checkpoint gives weights and optimizer state.

    Raises ConfigError as a run would, or if `run` has no checkpoint.
    """
    # An attention that has a forward mode.
    attention = "sdpa" if config.pair.attention == "flash_attention_2" else config.pair.attention
    changes = {
        "learner": config.learner.model_copy(update={"compute_dtype": config.pair.student.dtype}),
        "pair": config.pair.model_copy(update={"attention": attention}),
    }
    with scratch_parts(config.model_copy(update=changes)) as parts:
        steps = 0
        if run is not None:
            saved = Checkpoints(RunFolder(run).checkpoints, parts.ranks).newest()
            if saved is None:
                raise ConfigError(f"--run: {run} holds no complete checkpoint (checkpoint/step_…)")
            saved.load(parts.pair.student.module, parts.learner.optimizer)
            steps = saved.step
        yield Probe(parts, steps)


def selectors_of(config: RunConfig, names: list[str] | None) -> dict[str, Selector]:
    """Selectors by name: those of `names`, or all of conf/selector and the config's own. Raises ConfigError.

    The config's own has CONFIGURED after its name if more than its retention differs from the option of that name.
    """
    quadrants = config.quadrants.entropy, config.quadrants.divergence
    selectors = {name: preset(name, quadrants) for name in names or selector_options()}
    if names is None:
        label, configured = config.selector.label, make_selector(config)
        option = selectors.get(label)
        same = option is not None and replace(option, retention=configured.retention) == configured
        selectors[label if same else f"{label}{CONFIGURED}"] = configured
    return selectors


def at_ratios(selectors: dict[str, Selector], ratios: list[float]) -> Iterator[tuple[str, Selector]]:
    """Every selector at every retention; one without a budget comes once."""
    for name, selector in selectors.items():
        for retention in [selector.retention] if selector.order == "positive" else ratios:
            yield name, replace(selector, retention=retention)
