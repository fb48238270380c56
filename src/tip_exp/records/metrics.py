"""Names of all metrics, spelled once. A name is `<stage>/<what>[_unit]`; `_frac` is a fraction in [0, 1].

An accuracy is `eval/<benchmark>/<what>` (student) or `teacher/<benchmark>/<what>`; result.json drops the stage.

| name                            | what                                                              | unit          |
|---------------------------------|-------------------------------------------------------------------|---------------|
| mean@k, greedy                  | mean accuracy of k samples a problem; of the greedy response      | fraction      |
| <accuracy>_se                   | standard error of an accuracy over the problems                   | fraction      |
| pass@j, j = 1, 2, 4 … k         | any of j responses right, expected over draws of j of the k       | fraction      |
| maj@k, best@k                   | the most frequent answer (by value) right; best of k scores       | fraction      |
| best@k_bootstrap                | expected best of k draws with replacement (verl's best@k)         | fraction      |
| strict_mean@k, strict_agreement | graded by string comparison; share of equal verdicts              | fraction      |
| no_tool_baseline                | score that needs no tool call (tool tasks)                        | fraction      |
| seq_kl, log_seq_kl              | KL(student || teacher) summed over a response; log(seq_kl + 1e-3) | nats, mean    |
| finished_accuracy, truncated_…  | accuracy of the responses that ended; of those that were cut off  | fraction      |
| ungraded_frac                   | responses whose comparison had no result; they count as wrong     | fraction      |
| repetition_rate                 | 1 - distinct / all 4-grams of token ids, mean over responses      | fraction      |
| response_len, …_frac            | tokens of a response; truncated; without an answer                | tokens, frac  |
| train/loss, grad_norm, lr       | divergence as learner.average means it; before clipping; rate     | nats, -, -    |
| train/update_ratio              | norm of the optimizer's update over that of the weights           | -             |
| train/skipped                   | 1 if no token was kept or a number was not finite: no update      | 0 or 1        |
| train/non_finite                | 1 in a skipped step whose loss or gradient was not finite         | 1             |
| select/response_tokens, kept_…  | response tokens of a step; those the loss uses                    | tokens        |
| select/kept_frac                | kept_tokens over response_tokens                                  | fraction      |
| select/gradient_mass, kl_mass   | grad_norm, reverse KL summed over kept tokens, over that of all   | fraction      |
| select/overlap_entropy          | Jaccard index with as many top-entropy tokens of each rollout     | fraction      |
| select/gradient_cosine          | of the kept tokens' gradient with that of all response tokens     | -             |
| select/gradient_snr, …_full     | |E g|^2 / Var g of the kept tokens' gradient g of a step, between | -             |
|                                 | its prompts; of that of all response tokens                       |               |
| select/influence_share          | positive influence on the step's divergence, summed over the kept | fraction      |
|                                 | tokens, over that of all (docs/influence.md)                      |               |
| shadow/<rule>/overlap           | Jaccard index with the tokens that are trained on                 | fraction      |
| shadow/<rule>/kept_frac, …      | as select/kept_frac, gradient_mass, kl_mass and                   | fraction      |
|                                 | quadrant/q1_kept_frac, … for what a rule of selector.shadows      |               |
|                                 | keeps                                                             |               |
| select/score_at_…, kept_at_…    | mean score, kept share at these response positions                | -, fraction   |
| score/<statistic>_mean          | mean over the response tokens; units: STATISTICS of scores.py     | nats, -       |
| score/entropy_gap_mean          | mean of |H(student) - H(teacher)| over the response tokens        | nats          |
| quadrant/q1_share, …            | tokens in the quadrant over all response tokens                   | fraction      |
| quadrant/q1_kept_frac, …        | kept tokens of the quadrant over its tokens                       | fraction      |
| quadrant/q1_divergence_share, … | reverse KL summed over the quadrant, over that of all tokens      | fraction      |
| rollout/response_len, …         | mean length; truncated_frac; tokens_per_s; logprob_mismatch_…     | tokens, -, …  |
| episode/…                       | of the newest episodes: scores, turns, calls, shares of stops     | mean          |
| time/<span>_s                   | time in the span since the last row                               | seconds       |
| memory/<span>_peak_gib          | highest memory in the span (meter.py: what it counts)             | GiB           |
| memory/<span>_extra_mib         | highest torch allocation in the span above its start              | MiB           |
| memory/process_peak_gib         | resident memory of the process                                    | GiB           |
| memory/reserved_peak_gib, …     | CUDA: reserved by torch; device_used_peak_gib: by all processes   | GiB           |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Stages that start a name.
EVAL, TEACHER, MEMORY, SHADOW = "eval/", "teacher/", "memory/", "shadow/"

# Accuracies of a benchmark: mean_at(4) is "mean@4", standard_error_of("mean@4") is "mean@4_se".
GREEDY, NO_TOOL_BASELINE = "greedy", "no_tool_baseline"
SEQ_KL, LOG_SEQ_KL = "seq_kl", "log_seq_kl"
mean_at = "mean@{}".format
pass_at = "pass@{}".format
maj_at = "maj@{}".format
best_at = "best@{}".format
standard_error_of = "{}_se".format
bootstrap = "{}_bootstrap".format
FINISHED_ACCURACY, TRUNCATED_ACCURACY = "finished_accuracy", "truncated_accuracy"
UNGRADED_FRAC, REPETITION_RATE = "ungraded_frac", "repetition_rate"
strict = "strict_{}".format  # strict("mean@4"): graded by string comparison
STRICT_AGREEMENT = strict("agreement")
LENGTH, TRUNCATED, UNPARSED = "response_len", "truncated_frac", "unparsed_frac"

LOSS, GRAD_NORM, LR, SKIPPED = "train/loss", "train/grad_norm", "train/lr", "train/skipped"
UPDATE_RATIO, NON_FINITE = "train/update_ratio", "train/non_finite"

RESPONSE_TOKENS, KEPT_TOKENS, KEPT_FRAC = "select/response_tokens", "select/kept_tokens", "select/kept_frac"
OVERLAP_ENTROPY = "select/overlap_entropy"
GRADIENT_MASS, KL_MASS = "select/gradient_mass", "select/kl_mass"
GRADIENT_COSINE, GRADIENT_SNR = "select/gradient_cosine", "select/gradient_snr"
GRADIENT_SNR_FULL, INFLUENCE_SHARE = "select/gradient_snr_full", "select/influence_share"
OVERLAP = "select/overlap"  # of a shadow
score_at = "select/score_at_{}_{}".format  # first and last position
kept_at = "select/kept_at_{}_{}".format

RESPONSE_LEN, TRUNCATED_FRAC = f"rollout/{LENGTH}", f"rollout/{TRUNCATED}"
TOKENS_PER_S = "rollout/tokens_per_s"
MISMATCH_MEAN, MISMATCH_P999, MISMATCH_MAX = (f"rollout/logprob_mismatch_{name}" for name in ("mean", "p999", "max"))

HEALTHY = "healthy"  # verdict on a run in result.json

# By statistic and by quadrant.
score_mean = "score/{}_mean".format
ENTROPY_NORM_MEAN, ENTROPY_GAP_MEAN = score_mean("entropy_norm"), score_mean("entropy_gap")
QUADRANTS = ("q1", "q2", "q3", "q4")
quadrant_share = "quadrant/{}_share".format
quadrant_kept_frac = "quadrant/{}_kept_frac".format
quadrant_divergence_share = "quadrant/{}_divergence_share".format

# By span of the meter.
seconds = "time/{}_s".format
peak_gib = "memory/{}_peak_gib".format
extra_mib = "memory/{}_extra_mib".format
PROCESS_PEAK_GIB, RESERVED_PEAK_GIB, DEVICE_USED_PEAK_GIB = map(peak_gib, ("process", "reserved", "device_used"))


def of_shadow(rule: str, metric: str) -> str:
    """ "q3", "select/kept_frac" -> "shadow/q3/kept_frac" """
    return f"{SHADOW}{rule}/{metric.partition('/')[2]}"


def log_kl(seq_kl: float) -> float:
    """Logarithm of a response's KL in nats; a thousandth is added, as the KL of a short response can be 0."""
    return math.log(seq_kl + 1e-3)


def main_accuracy(benchmark: str, samples: int) -> str:
    """The accuracy that tables show: "math500/mean@4", or "math500/greedy" where nothing is sampled."""
    return f"{benchmark}/{mean_at(samples) if samples else GREEDY}"


def of_stage(metrics: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """{"eval/math500/greedy": 0.5, "train/loss": 2.0}, EVAL -> {"math500/greedy": 0.5}"""
    return {name.removeprefix(stage): value for name, value in metrics.items() if name.startswith(stage)}


def weak_teachers(metrics: Mapping[str, float]) -> list[str]:
    """The accuracies of step 0 in which the teacher is not above the student: ["word_sums/mean@4"]."""
    names = [name for name in metrics if name.startswith(EVAL) and standard_error_of(name) in metrics]
    of_teacher = {name: metrics.get(TEACHER + name.removeprefix(EVAL), math.inf) for name in names}
    return [name.removeprefix(EVAL) for name in names if of_teacher[name] <= metrics[name]]


def format_accuracies(step: int, metrics: Mapping[str, float]) -> str:
    """A line for the terminal: "step    20   word_sums/mean@4 50.3 %   word_sums/seq_kl 5.1 nats   reverse KL 0.16"."""
    parts = [f"step {step:>5}"]
    accuracies = [name for name in metrics if standard_error_of(name) in metrics]
    accuracies += [name for name in metrics if name.startswith(EVAL) and name.endswith(f"/{NO_TOOL_BASELINE}")]
    for name in accuracies:
        value = f"{metrics[name]:.2f} nats" if name.endswith(f"/{SEQ_KL}") else f"{100 * metrics[name]:.1f} %"
        parts.append(f"{name.removeprefix(EVAL)} {value}")
    if (reverse_kl := metrics.get(score_mean("reverse_kl"))) is not None:
        parts.append(f"reverse KL {reverse_kl:.3f}")
    return "   ".join(parts)
