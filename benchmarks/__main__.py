"""Measure time and memory beside other implementations, one CSV with one row per repetition each; simulate coverage.

Run from the repository root: python -m benchmarks loss --quick
What --quick measures goes to outputs/bench unless --out names a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks import coverage, e2e, gpu_check, loss, rollout, step

# name: (module, line of --help)
BENCHMARKS: dict[str, tuple[ModuleType, str]] = {
    "loss": (loss, "the masked loss and its gradient: this package, TRL, Liger, plain PyTorch, and the GEMMs alone"),
    "step": (step, "a whole optimizer step, with each loss in the same learner"),
    "e2e": (e2e, "whole trainings by TRL's DistillationTrainer and by this package"),
    "coverage": (coverage, "how often the report's intervals hold the true difference, simulated"),
    "gpu_check": (gpu_check, "what only a GPU can show, in 15 minutes; writes results/gpu"),
    "rollout": (rollout, "sampled tokens per second of the backends vllm and hf"),
}

QUICK = Path("outputs/bench")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="benchmark", required=True)
    published: dict[str, Path | None] = {}  # the default of --out
    for name, (module, purpose) in BENCHMARKS.items():
        subparser = subparsers.add_parser(name, help=purpose, description=module.__doc__)
        module.add_arguments(subparser)
        published[name] = subparser.get_default("out")
    options = parser.parse_args(arguments)
    if getattr(options, "quick", False) and options.out is published[options.benchmark]:
        options.out = QUICK / options.out.name
    BENCHMARKS[options.benchmark][0].main(options)


if __name__ == "__main__":
    main()
