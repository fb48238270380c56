"""The columns of a table of arms: their texts, what they mean, and arms selected and sorted by them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tip_exp.report.arms import ArmResult
from tip_exp.report.significance import Estimate
from tip_exp.utils.errors import DataError, first_line

MARGIN = 2.0  # points of accuracy: a smaller difference to full does not matter
ONE_TOKEN = 1e-5  # a smaller retention keeps one token of a response (rounding=at_least_one)
LABELS = ("pair", "data", "benchmark", "selector", "retention")
TEXTS = ("pair", "benchmark", "selector", "errors cover", "state", "differs in")  # columns that numbers do not sort
NOT_OF_ARMS = ("seed", "name", "sweep")  # in which the runs of an arm differ
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")
# what the columns with these names mean, as lines below the tables
LEGEND = {
    ("retention", "kept", "Q3 kept"): (
        "retention: the budget that was set; kept: share of the response tokens that were trained on, in % "
        "(selector.rounding rounds the budget of a response or of the batch; tokens of weight 0 count as kept); "
        "Q3 kept: the same share among tokens of low entropy and high divergence"
    ),
    ("final", "greedy", "errors cover"): (
        "final: mean@k of the sampled responses in % (of tool tasks: the share of constraints met), greedy: accuracy "
        "of the greedy response in %, each ± its standard error. "
        "Errors and intervals that do not cover seeds hold for these trained students only, without p"
    ),
    ("gap closed",): "gap closed: (final - step 0) / (teacher - step 0)",
    ("vs full", "p"): (
        "vs full: difference to training on every token, on the same problems, in points [95 % interval]; p (Holm): "
        "two-sided, corrected over all comparisons of this setting among the runs that were read, in results/ those of "
        "one sweep (variances of problems and seeds, Student's t; simulated coverage: results/coverage.md)"
    ),
    ("within",): (
        f"within ± {MARGIN:g}: yes if two one-sided tests at 5 % show a difference within ± {MARGIN:g} points; in "
        "brackets the smallest margin for which they do. no: the 95 % interval lies outside "
        f"± {MARGIN:g}; not shown: neither, more seeds or problems are needed"
    ),
    ("KL/response", "KL vs full", "KL p"): (
        "KL/response: KL(student || teacher) in nats, summed over a sampled response to a test problem; KL vs "
        "full: ratio of the geometric means [95 % interval], with its own p"
    ),
    ("loss MiB",): (
        "loss MiB: peak allocation of the masked loss; it copies the kept tokens unless all are kept, so that 50 % can "
        "take more than 100 %"
    ),
    ("seconds",): "seconds: wall clock of a run",
}


def percent(accuracy: Estimate) -> str:
    """ "81.0 ± 1.5", without the error if it was not measured."""
    error = "" if math.isnan(accuracy.se) else f" ± {100 * accuracy.se:.1f}"
    return "-" if math.isnan(accuracy.mean) else f"{100 * accuracy.mean:.1f}{error}"


def points(difference: Estimate | None) -> str:
    """ "+1.2 [-0.5, 2.9]" """
    if difference is None:
        return "-"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:.1f}, {100 * difference.high:.1f}]"


def ratio(log_difference: Estimate | None) -> str:
    """ "× 0.83 [0.78, 0.88]" """
    if log_difference is None:
        return "-"
    low, high = math.exp(log_difference.low), math.exp(log_difference.high)
    return f"× {math.exp(log_difference.mean):.2f} [{low:.2f}, {high:.2f}]"


def equivalence(difference: Estimate | None) -> str:
    """ "yes (± 1.4)", "not shown (± 3.9)", "no (± 30.1)" if it is larger than MARGIN at 95 %; "-" with one seed."""
    if difference is None or math.isnan(difference.margin):
        return "-"
    margin = 100 * difference.margin
    is_larger = 100 * (abs(difference.mean) - difference.half_width()) > MARGIN
    return f"{'yes' if margin <= MARGIN else 'no' if is_larger else 'not shown'} (± {margin:.1f})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else _number("{:.3f}", p)


def errors_cover(arm: ArmResult) -> str:
    covered = _covered(arm.seeds > 1)
    if arm.difference is None or _covered(arm.difference.over_seeds) == covered:
        return covered if arm.seeds else "-"
    return f"{covered}; vs full: {_covered(arm.difference.over_seeds)}"


def _covered(over_seeds: bool) -> str:
    return "problems and seeds" if over_seeds else "problems, not seeds"


def _number(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)


# heading -> text of an arm's cell
COLUMNS: dict[str, Callable[[ArmResult], str]] = {
    "pair": lambda arm: arm.pair,
    "benchmark": lambda arm: arm.benchmark,
    "selector": lambda arm: arm.selector,
    "retention": lambda arm: "1 token" if arm.retention < ONE_TOKEN else f"{100 * arm.retention:g} %",
    "kept": lambda arm: _number("{:.1f} %", 100 * arm.kept_frac),
    "Q3 kept": lambda arm: _number("{:.1f} %", 100 * arm.q3_kept_frac),
    "seeds": lambda arm: str(arm.seeds),
    "no-tool baseline": lambda arm: _number("{:.1f}", 100 * arm.no_tool_baseline),
    "teacher ± se": lambda arm: percent(arm.teacher),
    "step 0 ± se": lambda arm: percent(arm.start),
    "final ± se": lambda arm: percent(arm.final),
    "greedy ± se": lambda arm: percent(arm.greedy),
    "gap closed": lambda arm: _number("{:z.0f} %", 100 * arm.gap_closed),
    "vs full [95 %]": lambda arm: points(arm.difference),
    "errors cover": errors_cover,
    "p (Holm)": lambda arm: p_value(arm.p_holm),
    f"within ± {MARGIN:g}": lambda arm: equivalence(arm.difference),
    "KL/response": lambda arm: _number("{:.3g}", arm.seq_kl),
    "KL vs full [95 %]": lambda arm: ratio(arm.kl_difference),
    "KL p (Holm)": lambda arm: p_value(arm.kl_p_holm),
    "loss MiB": lambda arm: _number("{:.1f}", arm.loss_mib),
    "seconds": lambda arm: _number("{:.0f}", arm.wall_s),
    "state": lambda arm: arm.state,
    "differs in": lambda arm: arm.differs,
}


def column_name(heading: str) -> str:
    """ "vs full" of "vs full [95 %]", "p" of "p (Holm)", "final" of "final ± se"."""
    return re.split(r" [±\[(]", heading)[0]


NAMES = {column_name(heading): heading for heading in COLUMNS}


def select_arms(arms: list[ArmResult], conditions: Sequence[str]) -> list[ArmResult]:
    """The arms for which every "key=value" holds; a key is a config key or one of LABELS.

    Raises DataError for a condition without "=" and for a key that no arm has.
    """
    keys = {*LABELS, *(key for arm in arms for key in arm.config)}
    for condition in conditions:
        key, separator, value = condition.partition("=")
        if not separator or key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            if key in NOT_OF_ARMS:
                hint = f"; a row averages over all values of {key}; give only the folders of the runs you want"
            raise DataError(f"--where {condition}: give KEY=VALUE with a config key or {', '.join(LABELS)}{hint}")
        try:
            wanted = OmegaConf.from_dotlist([f"value={value}"]).value  # reads 1e-3 as a number, as an override does
        except (YAMLError, OmegaConfBaseException) as error:
            raise DataError(f"--where {condition}: {first_line(error)}") from None
        if key.endswith("retention") and isinstance(wanted, int | float) and wanted > 1:
            raise DataError(f"--where {condition}: a retention is a fraction; 10 % is retention=0.1")
        arms = [arm for arm in arms if (getattr(arm, key) if key in LABELS else arm.config.get(key)) == wanted]
    return arms


def sort_arms(arms: list[ArmResult], name: str, *, descending: bool = False) -> list[ArmResult]:
    """By the first number in the column of this name, else by its text; cells without a value come last."""
    if name not in NAMES:
        raise DataError(f"--sort {name}: there is no such column; columns are {', '.join(NAMES)}")

    def key(arm: ArmResult) -> tuple[bool, float, str]:
        if name == "retention":  # "1 token" is not 1 %
            return False, arm.retention, ""
        text = COLUMNS[NAMES[name]](arm)
        number = None if name in TEXTS else first_number(text)  # q3 is no 3
        return (text == "-") != descending, number or 0.0, text

    return sorted(arms, key=key, reverse=descending)


def first_number(text: str) -> float | None:
    """The first number in a cell: 1230.0 of "1.23e+03 ± 4"; None if there is none."""
    number = _NUMBER.search(text)
    return float(number[0]) if number else None
