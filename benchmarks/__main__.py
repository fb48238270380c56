"""`tip-bench`: what the product costs, beside its peers. Each subcommand writes one CSV, one row a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import e2e, loss, rollout, step

# name: (module, what --help says)
COMMANDS: dict[str, tuple[Any, str]] = {
    "loss": (loss, "the masked update alone: ours, TRL's, Liger's, naive, and its matrix products"),
    "step": (step, "a whole optimizer step, with each loss in the same backbone"),
    "e2e": (e2e, "whole trainings by TRL's DistillationTrainer and by ours"),
    "rollout": (rollout, "tokens a second of vllm and of hf"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tip-bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=purpose, description=module.__doc__))
    chosen = parser.parse_args(arguments)
    COMMANDS[chosen.command][0].main(chosen)


if __name__ == "__main__":
    main()
