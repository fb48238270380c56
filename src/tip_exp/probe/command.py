"""The arguments of `tip-exp influence` and `tip-exp advise`; what they do not name is Hydra's, as in `tip-exp`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tip_exp.utils.errors import ConfigError, DataError, RunFailedError

if TYPE_CHECKING:
    from tip_exp.config.schema import RunConfig

PROBES = {
    "influence": "the influence of every token of a few batches on a direction, and how much of it each rule keeps",
    "advise": "which rules at which ratios keep the gradient of all tokens, read off a few batches before training",
}
RATIOS = "1,2,5,10,20,50,100"


def command(name: str, arguments: list[str]) -> tuple[Callable[[DictConfig], None], list[str]]:
    """What to do with the composed config, and the arguments that are Hydra's."""
    options, overrides = _parser(name).parse_known_args(arguments)

    def body(raw: DictConfig) -> None:
        from tip_exp.config.parse import parse

        try:
            measure(parse(raw))
        except DataError as error:
            raise ConfigError(str(error)) from error
        except FloatingPointError as error:  # of a rule's scores
            raise RunFailedError(str(error)) from error

    def measure(config: RunConfig) -> None:
        out = options.out or Path("outputs") / name / config.name
        shared = {"num_batches": options.batches, "rules": options.rules, "ratios": options.ratios, "run": options.run}
        if name == "advise":
            from tip_exp.probe.advise import advise

            advise(config, out, **shared)
        else:
            from tip_exp.probe.influence import influence

            adam, fresh = options.preconditioner == "adam", options.direction == "fresh"
            influence(config, out, fresh=fresh, adam=adam, **shared)
        print(f"\nwritten to {out}")

    return body, overrides


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tip-exp {name}",
        usage=f"tip-exp {name} [group=option …] [key=value …] [options]",
        description=f"{PROBES[name].capitalize()}. Groups and keys are those of `tip-exp --help`; nothing is trained.",
        epilog=f"example: tip-exp {name} pair=tiny data=word_sums --batches 4",
    )
    fewest = 2 if name == "advise" else 1
    parser.add_argument(
        "--batches", type=_at_least(fewest), default=4, help=f"steps whose tokens are measured, {fewest} or more (4)"
    )
    if name == "influence":
        parser.add_argument(
            "--direction",
            choices=("fresh", "own"),
            default="fresh",
            help="gradient of as many further batches, or of each batch itself, which costs less (fresh)",
        )
        parser.add_argument(
            "--preconditioner", choices=("adam", "none"), default="adam", help="P: Adam's scaling, or 1 (adam)"
        )
    parser.add_argument(
        "--rules", type=lambda text: text.split(","), metavar="A,B", help="options of conf/selector (default: all)"
    )
    parser.add_argument("--ratios", type=_ratios, default=RATIOS, metavar="R,S", help=f"retentions in %% ({RATIOS})")
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="a run of this config: take weights and optimizer of its checkpoint"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"where tables and page go (default: outputs/{name}/NAME)"
    )
    return parser


def _at_least(fewest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < fewest:
            raise argparse.ArgumentTypeError(f"{fewest} or more; got {text}")
        return int(text)

    return number


def _ratios(text: str) -> list[float]:
    ratios = [float(part) / 100 for part in text.split(",")]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"percentages above 0 and at most 100; got {text}")
    return ratios
