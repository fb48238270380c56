"""Run records -> one `ArmResult` per arm and benchmark: accuracy over seeds, cost, difference to the full-token arm.

An arm is all seeds of one config: runs are averaged only if they differ in nothing but the seed and what is only
logged. Where arms look alike in a table (same pair, data, selector and retention), `differs` names the keys that tell
them apart.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from tip_exp.config.parse import deciding, flatten
from tip_exp.config.presets import default_values
from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord
from tip_exp.report.significance import ArmScores, Estimate, compare, estimate, holm, scores_of

ONLY_LOGGED = {"learner.diagnostics_every", "learner.gradient_every", "selector.shadows"}
SHOWN_FIELDS = "pair", "data", "benchmark", "selector", "retention"  # arms look alike that share these
CONTAMINATION_KINDS = ("exact", "13gram")  # in_train_… of result.json


@dataclass(slots=True)
class ArmResult:
    """What the finished seeds of one arm reached on one benchmark. `runs` and `folders` count unfinished seeds too."""

    pair: str
    data: str
    benchmark: str
    selector: str
    score: str
    retention: float
    config: dict[str, Any] = field(repr=False)  # flat, without the seed and NOT_DECIDING
    identity: str = field(repr=False)  # `config` as text
    setting: str = field(repr=False)  # `config` without the selector, as text
    seeds: int
    runs: int
    folders: list[str]
    sweeps: list[str]
    hardware: list[str]
    revisions: list[str]  # of git
    teacher: Estimate  # accuracies are fractions; each of teacher and start is evaluated alike in every run
    start: Estimate
    final: Estimate
    greedy: Estimate
    strict: float  # `final` graded by string comparison
    seq_kl: float  # nats per held-out response
    kept_tokens: float
    kept_frac: float  # of the response tokens
    q3_kept_frac: float  # of the response tokens in Q3
    overlap_entropy: float
    loss_mib: float
    peak_gib: float
    process_gib: float
    wall_s: float
    no_tool_baseline: float
    unhealthy: list[str] = field(repr=False)  # of each run that is not healthy: its verdict (records/result.py)
    in_train: tuple[int, int]  # test problems in the training set: whole, by 13 words alone
    scores: ArmScores | None = field(repr=False)  # None if a run has other problems than the others
    kl_scores: ArmScores | None = field(repr=False)  # log KL of a response
    change: Estimate | None = None  # of the accuracy since step 0, on the same problems
    difference: Estimate | None = None  # to the full-token arm of the same setting, a fraction
    kl_difference: Estimate | None = None  # of the log KL
    p_holm: float = math.nan
    kl_p_holm: float = math.nan
    is_paired: bool = True  # by seed with the full-token arm, or one of them has a single seed
    contradictions: int = 0  # runs left out because a run of the same config and seed, with other scores, counts
    differs: str = ""  # as of `distinctions`, among the arms of all settings
    name: str = ""  # "entropy 50 %", with what tells it from arms of its setting that look alike: one name for one arm

    @property
    def is_trained(self) -> bool:
        """False for evaluations alone (mode=eval), whose config has a selector that nothing used."""
        return self.config["mode"] == "train"

    @property
    def is_baseline(self) -> bool:
        """Whether all tokens count alike."""
        return self.score == "full" and self.config.get("selector.weight", "none") == "none"

    @property
    def gap_closed(self) -> float:
        """(final - start) / (teacher - start), a fraction; nan if the teacher is not better than step 0."""
        gap = self.teacher.mean - self.start.mean
        return (self.final.mean - self.start.mean) / gap if gap > 0 else math.nan

    @property
    def state(self) -> str:
        return "done" if self.seeds == self.runs else f"{self.runs - self.seeds} of {self.runs} unfinished"

    def values_of(self, keys: list[str]) -> list[str]:
        """["learner.lr=0.001", "learner.num_steps=40"], each on one line"""
        return [f"{key}={self.config.get(key)}".replace("\n", "\\n") for key in keys]


def summarize(records: list[RunRecord]) -> list[ArmResult]:
    """One result per arm and benchmark, in the order of the records.

    A seed that was run twice (in two sweeps, for example) counts once: the first finished run. The baseline of a
    `difference` is the arm of selector.score=full with equal weights that shares everything but the selector. `p_holm`
    is corrected over all comparisons of one setting on all its benchmarks, and so is `kl_p_holm`.
    """
    by_seed: dict[tuple[str, str, int], RunRecord] = {}
    contradictions: Counter[tuple[str, str]] = Counter()
    for record in records:
        identity = json.dumps(_arm_config(record.config), sort_keys=True)
        for benchmark in record.config["eval"]["benchmarks"]:
            key = identity, benchmark, record.config["seed"]
            counted = by_seed.get(key)
            if counted is None or (record.is_done and not counted.is_done):
                by_seed.pop(key, None)
                by_seed[key] = record
            elif record.is_done and record.outcomes != counted.outcomes:
                contradictions[identity, benchmark] += 1
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for (identity, benchmark, _), record in by_seed.items():
        groups.setdefault((identity, benchmark), []).append(record)
    arms = [_arm(group, identity, benchmark) for (identity, benchmark), group in groups.items()]
    baselines = {(arm.setting, arm.benchmark): arm for arm in arms if arm.is_baseline and arm.seeds}
    for arm in arms:
        arm.contradictions = contradictions[arm.identity, arm.benchmark]
        if (baseline := baselines.get((arm.setting, arm.benchmark))) and arm is not baseline:
            arm.difference = compare(arm.scores, baseline.scores)
            arm.kl_difference = compare(arm.kl_scores, baseline.kl_scores)
            if arm.scores is not None and baseline.scores is not None:
                seeds = set(arm.scores.seeds), set(baseline.scores.seeds)
                arm.is_paired = seeds[0] == seeds[1] or min(map(len, seeds)) == 1
    for family in group_by(arms, "setting").values():
        for name, p_name in (("difference", "p_holm"), ("kl_difference", "kl_p_holm")):
            differences: list[Estimate | None] = [getattr(arm, name) for arm in family]
            p_values = holm([difference.p if difference else math.nan for difference in differences])
            for arm, p_holm in zip(family, p_values, strict=True):
                setattr(arm, p_name, p_holm)
        for arm, text in zip(family, distinctions(family), strict=True):
            arm.name = f"{arm.selector} {100 * arm.retention:g} %" + (f" ({text})" if text else "")
    for arm, text in zip(arms, distinctions(arms), strict=True):
        arm.differs = text
    return arms


def distinctions(arms: list[ArmResult]) -> list[str]:
    """What tells each arm from those of `arms` that look alike: "learner.lr=0.001"; "" if none does.

    A table asks for its own rows: what they share is in its title.
    """
    alike = group_by(arms, *SHOWN_FIELDS)
    keys = {shown: differing_keys(group) for shown, group in alike.items()}
    return [", ".join(arm.values_of(keys[attrgetter(*SHOWN_FIELDS)(arm)])) for arm in arms]


def group_by(arms: Iterable[ArmResult], *fields: str) -> dict[Any, list[ArmResult]]:
    """Arms by the value of a field (a tuple of values for several), in the order of first appearance."""
    groups: dict[Any, list[ArmResult]] = {}
    for arm in arms:
        groups.setdefault(attrgetter(*fields)(arm), []).append(arm)
    return groups


def setting_names(groups: list[list[ArmResult]]) -> list[str]:
    """ "tiny, word_sums, learner.lr=0.001" of each setting: pair, data, and what tells settings with these apart."""
    names: list[str] = []
    for first, *_ in groups:
        similar = [peer for peer, *_ in groups if (peer.pair, peer.data) == (first.pair, first.data)]
        keys = differing_keys(similar, ignored=("selector.", "pair.label", "data.label"))
        names.append(", ".join([first.pair, first.data, *first.values_of(keys)]))
    return names


def differing_keys(arms: list[ArmResult], *, ignored: tuple[str, ...] = ()) -> list[str]:
    """The config keys whose values are not the same in all arms; an absent key counts as null.

    Keys that start with one of `ignored` are left out.
    """
    keys = sorted({key for arm in arms for key in arm.config if not key.startswith(ignored)})
    return [key for key in keys if len({json.dumps(arm.config.get(key)) for arm in arms}) > 1]


def _arm_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config, flat, without what the runs of an arm may differ in. Keys that it lacks, of a later version of
    this package, have their defaults.
    """
    flat = deciding(flatten(default_values()) | flatten(config))
    for key in {"seed", *ONLY_LOGGED} & flat.keys():
        del flat[key]
    if flat.get("pair.student.per_seed"):
        del flat["pair.student.path"]
    return flat


def _arm(records: list[RunRecord], identity: str, benchmark: str) -> ArmResult:
    config = json.loads(identity)
    done = [record for record in records if record.is_done]
    results = [record.result for record in done if record.result is not None]
    main = metrics.main_accuracy(benchmark, config["eval.samples"])
    greedy = f"{benchmark}/{metrics.GREEDY}"
    scores = scores_of(done, benchmark, "right")
    described = [result.get("datasets", {}).get(benchmark, {}) for result in results]
    in_train = [
        {problem for of_run in described for problem in of_run.get(f"in_train_{how}", [])}
        for how in CONTAMINATION_KINDS
    ]
    verdicts = [result.get("health", metrics.HEALTHY) for result in results]
    return ArmResult(
        pair=config["pair.label"],
        data=config["data.label"],
        benchmark=benchmark,
        selector=config["selector.label"],
        score=config["selector.score"],
        retention=config["selector.retention"],
        config=config,
        identity=identity,
        setting=json.dumps({key: value for key, value in config.items() if not key.startswith("selector.")}),
        seeds=len(results),
        runs=len(records),
        folders=[record.folder for record in records],
        sweeps=sorted({record.config["sweep"] for record in records if record.config["sweep"]}),
        hardware=sorted({result["hardware"] for result in results}),
        revisions=sorted({revision_of(result) for result in results}),
        teacher=_of_one_model(results, "teacher", main),
        start=_of_one_model(results, "start", main),
        final=_final(results, main, scores),
        greedy=_final(results, greedy, scores if main == greedy else scores_of(done, benchmark, "greedy")),
        strict=_mean(results, "final", f"{benchmark}/{metrics.strict(metrics.mean_at(config['eval.samples']))}"),
        seq_kl=_mean(results, "final", f"{benchmark}/{metrics.SEQ_KL}"),
        kept_tokens=_mean(results, "totals", "kept_tokens"),
        kept_frac=_ratio(results, "kept_tokens", "response_tokens"),
        q3_kept_frac=_ratio(results, "q3_kept_tokens", "q3_tokens"),
        overlap_entropy=_mean(results, "totals", "overlap_entropy"),
        loss_mib=_mean(results, "memory", metrics.extra_mib("loss")),
        peak_gib=_mean(
            results, "memory", metrics.DEVICE_USED_PEAK_GIB, metrics.peak_gib("learner"), metrics.PROCESS_PEAK_GIB
        ),
        process_gib=_mean(results, "memory", metrics.PROCESS_PEAK_GIB),
        wall_s=_mean(results, "totals", "wall_s"),
        no_tool_baseline=_mean(results, "final", f"{benchmark}/{metrics.NO_TOOL_BASELINE}"),
        unhealthy=[verdict for verdict in verdicts if verdict != metrics.HEALTHY],
        in_train=(len(in_train[0]), len(in_train[1] - in_train[0])),
        scores=scores,
        kl_scores=scores_of(done, benchmark, metrics.SEQ_KL),
        change=compare(scores, scores_of(done, benchmark, "start")),
    )


def revision_of(result: dict[str, Any]) -> str:
    """The first 12 digits of the git revision, with the + of a checkout that had changes."""
    revision = result["git_revision"]
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", revision) if revision else "installed, not a checkout"


def _of_one_model(results: list[dict[str, Any]], part: str, name: str) -> Estimate:
    """The runs evaluate the same model alike, so that their mean has the error of one run, which is over problems.

    Step 0 of several students (pair.student.per_seed) has this error too, which leaves the students out.
    """
    return Estimate(_mean(results, part, name), _mean(results, part, metrics.standard_error_of(name)))


def _final(results: list[dict[str, Any]], name: str, scores: ArmScores | None) -> Estimate:
    """Mean over seeds with the error over problems and seeds; nan if several runs have no scores by problem."""
    if len(results) == 1:
        return _of_one_model(results, "final", name)
    return estimate(scores.scores) if scores else Estimate(_mean(results, "final", name), math.nan)


def _mean(results: list[dict[str, Any]], part: str, *names: str) -> float:
    """Mean over the runs of the first of these values that this part of a run's result has; nan if a run has none."""
    values = [
        next((value for name in names if (value := result[part].get(name)) is not None), math.nan) for result in results
    ]
    return float(np.mean(values)) if values else math.nan


def _ratio(results: list[dict[str, Any]], numerator: str, denominator: str) -> float:
    """The ratio of two totals, each summed over the runs that have both; nan if there is nothing to divide by."""
    totals = [result["totals"] for result in results if {numerator, denominator} <= result["totals"].keys()]
    total = sum(of_run[denominator] for of_run in totals)
    return sum(of_run[numerator] for of_run in totals) / total if total else math.nan
