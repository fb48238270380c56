"""What `tip-exp` says of a run before its first and after its last step."""

from __future__ import annotations

import math
import os
from pathlib import Path

from tip_exp.config.schema import RunConfig
from tip_exp.launch.ranks import ranks_per_node
from tip_exp.launch.reuse import read_result
from tip_exp.records.folder import RunFolder
from tip_exp.records.metrics import main_accuracy
from tip_exp.utils.gpus import visible_gpus


def opening(config: RunConfig, folder: RunFolder, verb: str = "in") -> str:
    """Two lines: the pair, the data and the steps; the selection, the device and, after `verb`, the folder."""
    pair, learner, selector = config.pair, config.learner, config.selector
    benchmarks = ", ".join(config.eval.benchmarks)
    if config.mode == "train":
        work = (
            f"student {pair.student.path} learns from {pair.teacher.path} on {config.data.label}, "
            f"{count(learner.num_steps, 'step')} of {count(learner.prompts_per_step, 'prompt')} x "
            f"{count(learner.samples_per_prompt, 'response')}"
        )
        is_budget = selector.order != "positive" or selector.score == "full"
        kept = f"{100 * selector.retention:g} % of the tokens" if is_budget else "every token with a positive score"
        details = [f"{selector.label} keeps {kept}", f"evaluates {benchmarks}"]
    else:
        model = pair.teacher.path if config.mode == "teacher" else pair.student.path
        work, details = f"evaluates {model} on {benchmarks}, without training", []
    ranks = ranks_per_node(config, os.environ) * config.nodes
    on_gpu = config.device == "cuda" or (config.device == "auto" and visible_gpus(os.environ))
    details.append(f"{'CUDA' if on_gpu else 'CPU'}, {count(ranks, 'rank')}")
    details.append(f"{verb} {shown(folder)}")
    return f"{config.name}: {work}\n  {'; '.join(details)}"


def closing(config: RunConfig, folder: RunFolder) -> str:
    """One line: accuracy before and after, the folder, and the command that shows more."""
    result = read_result(folder)
    if result is None:  # of a node that writes nothing
        return f"{config.name}: ended; {shown(folder)} is written by the first node"
    changes = "; ".join(f"{name} {change(result, name)}" for name in accuracies(config))
    return f"{config.name}: {changes}; in {shown(folder)}; next: tip-report {shown(folder)}"


def accuracies(config: RunConfig) -> list[str]:
    """The main accuracy of each benchmark."""
    return [main_accuracy(benchmark, config.eval.samples) for benchmark in config.eval.benchmarks]


def change(result: dict, name: str) -> str:
    """ "36.6 % -> 65.7 %": an accuracy in result.json before and after training, one number without training.

    Of mode=teacher, which evaluates no student, it is the teacher's.
    """
    start, final = (100 * part.get(name, math.nan) for part in (result["start"], result["final"] or result["teacher"]))
    return f"{final:.1f} %" if result["totals"]["steps"] == 0 else f"{start:.1f} % -> {final:.1f} %"


def count(number: int, noun: str) -> str:
    """1 step, 2 steps"""
    return f"{number} {noun}{'s' * (number != 1)}"


def shown(folder: RunFolder) -> str:
    """The folder's path as one would type it: relative if it is below the working directory."""
    root = folder.root.absolute()
    return str(root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root)
