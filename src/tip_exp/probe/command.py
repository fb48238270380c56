"""The arguments of `tip-exp influence`, `advise` and `replay`, which are checked before torch is imported.

What `influence` and `advise` do not name is Hydra's, as in `tip-exp`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.selector.scores import RuleError
from tip_exp.utils.errors import ConfigError, DataError, RunFailedError, exit_on_error, first_line, say
from tip_exp.utils.paths import OUTPUTS, not_writable

if TYPE_CHECKING:
    from tip_exp.config.schema import RunConfig

PROBES = {
    "influence": "the influence of every token of a few batches on a direction, and how much of it each rule keeps",
    "advise": "which rules at which ratios keep the gradient of all tokens, read off a few batches before training",
}
MAX_NAMED = 8  # keys in which a run's config differs
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
        except (FloatingPointError, RuleError) as error:  # of a rule
            raise RunFailedError(str(error)) from error

    def measure(config: RunConfig) -> None:
        from tip_exp.config.presets import check_selector_name

        if config.mode != "train":
            raise ConfigError(
                f"mode must be train, since only a training run has batches to measure; got {config.mode}"
            )
        for rule in options.rules or []:
            check_selector_name(rule)
        weights = "" if options.run is None else _weights(options.run, config)
        if weights:
            say(f"weights: {weights}")
        was_there = options.out is not None and options.out.exists()
        out = _folder(name, options, config)
        shared = {"num_batches": options.batches, "rules": options.rules, "ratios": options.ratios}
        shared |= {"run": options.run, "weights": weights}
        try:
            if name == "advise":
                from tip_exp.probe.advise import advise

                advise(config, out, **shared)
            else:
                from tip_exp.probe.influence import influence

                adam, fresh = options.preconditioner == "adam", options.direction == "fresh"
                influence(config, out, fresh=fresh, adam=adam, **shared)
        finally:
            if not was_there and not any(out.iterdir()):
                out.rmdir()
        print(f"\nwritten to {out}")

    return body, overrides


def replay(arguments: list[str]) -> None:
    """Print the table of a step; an error that a user can cause is one message without a traceback."""
    parser = argparse.ArgumentParser(
        prog="tip-exp replay",
        allow_abbrev=False,
        description="The rollouts of a step whose numbers were not finite, once more.",
    )
    parser.add_argument("run", type=Path, help="the run's folder, which holds non_finite_….json")
    parser.add_argument("--step", type=int, help="of the step; without it the last one that is kept")
    given = parser.parse_args(arguments)
    with exit_on_error(ValueError, OSError, RunFailedError):
        folder = RunFolder(given.run)
        batch = read_batch(folder, given.step)
        from tip_exp.probe.replay import replayed

        print(replayed(folder, batch))


def read_batch(folder: RunFolder, step: int | None) -> dict[str, Any]:
    """The rollouts of a step that was not finite, as the run kept them; of the last such step if `step` is None."""
    kept = {int(re.sub(r"\D", "", path.name)): path for path in folder.root.glob("non_finite_*.json")}
    if not kept:
        raise DataError(f"{folder.root} holds no non_finite_….json: no step of this run had a NaN or infinity")
    if step is not None and step not in kept:
        steps = ", ".join(map(str, sorted(kept)))
        raise DataError(f"--step {step}: no such non_finite_….json; {folder.root} holds the batches of steps {steps}")
    return json.loads(kept[max(kept) if step is None else step].read_text(encoding="utf-8"))


def _weights(run: Path, config: RunConfig) -> str:
    """Which checkpoint is read, and the keys in which the run's config differs; evaluations change nothing here."""
    from tip_exp.config.parse import differences, load

    checkpoints = numbered_checkpoints(RunFolder(run).checkpoints)
    if not checkpoints:
        raise ConfigError(f"--run: {run} holds no complete checkpoint (checkpoint/step_…)")
    try:
        differing = differences(load(RunFolder(run).config), config)
    except (OSError, ConfigError) as error:
        return f"{run}, whose config.yaml cannot be read by this version ({first_line(error)})"
    differing = [line for line in differing if not line.startswith("eval.")]
    if not differing:
        return f"{run}"
    more = f"; and {len(differing) - MAX_NAMED} more keys" if len(differing) > MAX_NAMED else ""
    return f"{run}, a run of another config (its value -> the value here): {'; '.join(differing[:MAX_NAMED])}{more}"


def _folder(name: str, options: argparse.Namespace, config: RunConfig) -> Path:
    """A new or empty folder for the results, made now. Raises ConfigError if --out cannot be one."""
    label = config.name if options.run is None else options.run.resolve().name
    out: Path = options.out or OUTPUTS / name / label
    if problem := not_writable(out):
        raise ConfigError(f"--out: {problem}")
    if options.out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out: {out} is not an empty folder; choose a new one")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in count(1):
        numbered = out if number == 1 else out.with_name(f"{label}.{number}")
        with suppress(FileExistsError):
            numbered.mkdir(parents=True)
            return numbered
    raise AssertionError("a number is free")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tip-exp {name}",
        allow_abbrev=False,
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
        "--run",
        type=Path,
        metavar="FOLDER",
        help="take weights and optimizer of a run's newest checkpoint; keys of its config that differ are printed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"where tables and page go (default: outputs/{name}/NAME, NAME that of --run; NAME.2 if that exists)",
    )
    return parser


def _at_least(fewest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < fewest:
            raise argparse.ArgumentTypeError(f"{fewest} or more; got {text}")
        return int(text)

    return number


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        ratios = []
    if ratios and max(ratios) < 0.01:
        fractions = ",".join(f"{1e4 * ratio:g}" for ratio in ratios)
        raise argparse.ArgumentTypeError(
            f"these are percentages: for retentions of {text} write {fractions}; ratios below 1 % are accepted only "
            "together with one of 1 % or more"
        )
    if ratios and all(0 < ratio <= 1 for ratio in ratios):
        return ratios
    raise argparse.ArgumentTypeError(f"percentages above 0 and at most 100; got {text}")
