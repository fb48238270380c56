"""ONE RUN: the student writes rollouts, the teacher reads them, the selector chooses tokens, the learner updates."""

from __future__ import annotations

import math
from contextlib import ExitStack

from tqdm import tqdm

from tip_exp.build import Parts, TrainingParts
from tip_exp.config.schema import RunConfig
from tip_exp.learner.samples import measure_top_tokens, sample_rows
from tip_exp.learner.schedule import is_due
from tip_exp.records import metrics as names
from tip_exp.records.folder import RunFolder
from tip_exp.utils.termination import Terminated, defer, is_requested


def run(config: RunConfig, folder: RunFolder) -> None:
    """Train a student; leaves metrics, evaluations, checkpoints and, written last, result.json in `folder`."""
    with ExitStack() as stack:
        parts = TrainingParts(config, folder, stack)  # data first, then weights: refuse what can be refused
        meter, last = parts.meter, config.learner.num_steps
        start = parts.resume(parts.inputs.saved)  # 0, or the checkpoint's step
        if start == 0:
            parts.evaluate_start()
        elif parts.ranks.is_main:
            print(f"{config.name}: resumes after step {start} of {last}", flush=True)

        if start == last:
            parts.export()  # of the checkpoint, in place of a model/ that may have been damaged since

        defer()  # from here on SIGTERM waits for the end of a step
        steps, silent = range(start + 1, last + 1), not parts.ranks.is_main
        progress = tqdm(steps, initial=start, total=last, desc=config.name, mininterval=1.0, disable=silent)
        for step in progress:
            is_eval_step = step == last or is_due(step, config.eval.every)
            num_shown = config.logger.rollouts_per_eval if is_eval_step else 0
            meter.count_allocations = is_eval_step
            with meter.span("step"):
                rollouts, problems = parts.rollouts(step)  # the student writes, with rollout.staleness=1 a step ahead
                shown = list(zip(rollouts, problems, strict=True))[:num_shown]
                top_tokens = measure_top_tokens(parts.teacher, shown) if shown else None
                # The teacher reads; statistics → mask → loss → update.
                report = parts.train_step(step, rollouts, problems)
                parts.check_mismatch(report.metrics, step)
                parts.sync()  # the next rollouts are the updated student's
            metrics = report.metrics | parts.rollout_metrics(rollouts)
            if is_eval_step:
                metrics |= parts.evaluate("student", step)
                parts.export()
                progress.write(names.format_accuracies(step, metrics))
            if top_tokens is not None:
                verdicts = parts.verdicts(shown)
                parts.logger.samples(step, sample_rows(parts.teacher, shown, report, top_tokens | verdicts))
            parts.log(step, metrics)
            progress.set_postfix(loss=f"{metrics.get(names.LOSS, math.nan):.3f}", refresh=False)
            ends = step < last and any(parts.ranks.gather_objects(is_requested()))
            if ends or step == last or step % config.learner.checkpoint_every == 0:
                parts.save(step)
            if ends:
                parts.checkpoints.wait()
                raise Terminated(f"after step {step}")

        parts.finish()  # result.json last


def run_eval(config: RunConfig, folder: RunFolder) -> None:
    """Evaluate a pair, or a teacher, without training; leaves the same records as a run of no steps."""
    with ExitStack() as stack:
        parts = Parts(config, folder, stack)
        parts.check_engine()
        parts.evaluate_start()
        parts.finish()
