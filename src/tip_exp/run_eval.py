"""ONE EVALUATION: the benchmarks of a pair without training, recorded as a run of no steps."""

from __future__ import annotations

from contextlib import ExitStack

from tip_exp.build import Parts
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.metrics import format_accuracies


def run_eval(config: RunConfig, folder: RunFolder) -> None:
    """Evaluate the student and, with `eval.teacher`, the teacher; writes the same records as a training run."""
    with ExitStack() as stack:
        parts = Parts(config, folder, stack)
        parts.write_first_prompts(parts.evaluations.first_prompts())
        metrics = parts.evaluate("teacher") if config.eval.teacher else {}
        metrics = parts.evaluate("student") | metrics
        parts.log(0, metrics)
        print(format_accuracies(0, metrics))
        parts.logger.finish(parts.write_result())
