"""The checks of whole parts. Each returns Markdown lines, and raises if what it checks does not hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import tiny
from benchmarks.gpu_check.models import write_pair
from benchmarks.gpu_check.report import table
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import RankMemory
from tip_exp.learner.on_policy import LIMITS
from tip_exp.models.load import load_pair
from tip_exp.records import metrics as names
from tip_exp.rollout.backends import choose
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.gpus import visible_gpus
from tip_exp.utils.io import read_rows
from tip_exp.utils.units import GIB

PAIR = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B")
LARGE_PAIR = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B")
FORECAST_ERROR = 0.1


class NotApplicable(Exception):
    """The check does not apply to this machine; the message says what it needs."""


@dataclass(frozen=True, slots=True)
class Settings:
    device: str
    tiny: bool
    ranks: int  # of run_ranks
    work: Path  # models and runs; shared by the checks

    def pair(self) -> list[str]:
        return write_pair(self.work / "qwen3_1p7b_0p6b", *PAIR, tiny=self.tiny, device=self.device)


Function = Callable[[Settings], list[str]]


def count_gpus() -> int:
    return max(1, len(visible_gpus(os.environ)))


def run_tests(settings: Settings) -> list[str]:
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(line, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1]
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"pytest: {summary}"
    assert settings.device == "cpu" or "passed" in summary, f"no test ran: {summary}"
    return [summary.strip("= ")]


def engine(settings: Settings) -> list[str]:
    """Its log-probs against the learner's before and after each change of weights; free memory awake and asleep."""
    config = tiny.compose_run(*settings.pair(), f"device={settings.device}")
    device, sampling = torch.device(settings.device), Sampling(4, 1.0, 1.0, 0, 32 if settings.tiny else 256)
    pair = load_pair(config.pair, device)
    backend = choose(config.rollout, device, config.pair.student.dtype)
    prompts = [pair.prompt_ids(prompt) for prompt in tiny.prompts(4, 0)]
    model, rows = pair.student.module, []
    with closing(backend.make(pair.student, pair, config.rollout, 512)) as sampler:
        for step in (1, 2, 3, 4):
            started = time.perf_counter()
            if step > 1:
                with torch.no_grad():  # an engine that keeps its old weights is then off by far more than the limit
                    pair.student.head.weight.mul_(1.5)
                sampler.sync()
            synced = time.perf_counter() - started
            started = time.perf_counter()
            rollouts = sampler.generate(prompts, sampling, seed=step)
            seconds, awake = time.perf_counter() - started, _free_gib(device)
            sampler.rest()
            asleep = _free_gib(device)
            mismatch = max(_mismatch(model, rollout) for rollout in rollouts)
            assert mismatch <= LIMITS[backend.dtype].mean, f"step {step}: mean log-prob mismatch {mismatch:.3g}"
            tokens_per_s = sum(rollout.num_response_tokens for rollout in rollouts) / seconds
            row = {"step": step, "tokens/s": f"{tokens_per_s:,.0f}", "log-prob mismatch": f"{mismatch:.2g}"}
            row |= {"GiB free awake": f"{awake:.2f}", "GiB free asleep": f"{asleep:.2f}"}
            rows.append(row | {"sync s": f"{synced:.2f}" if step > 1 else "-"})
    return [str(backend), "", *table(rows)]


def run_one(settings: Settings) -> list[str]:
    return _run(settings, "run", settings.pair(), 1)


def run_slice(settings: Settings) -> list[str]:
    folder = settings.work / "qwen3_8b_4b_slice"
    pair = write_pair(folder, *LARGE_PAIR, layers=2, tiny=settings.tiny, device=settings.device)
    return _run(settings, "run_slice", pair, 1)


def run_ranks(settings: Settings) -> list[str]:
    if settings.ranks == 1:
        raise NotApplicable("needs two GPUs")
    lines = _run(settings, "run_ranks", settings.pair(), settings.ranks)
    if (settings.work / "run" / "result.json").exists():
        first, ranks = (read_rows(settings.work / name / "metrics.jsonl")[1] for name in ("run", "run_ranks"))
        for key in (names.LOSS, names.RESPONSE_LEN):
            assert abs(ranks[key] / first[key] - 1) < 0.01, f"step 1: {key} is {first[key]} on one, {ranks[key]} on all"
    return lines


def forecast(settings: Settings) -> list[str]:
    rows: list[dict[str, object]] = []
    for path in sorted(settings.work.glob("*/forecast.json")):
        rows.append({"run": path.parent.name} | json.loads(path.read_text()))
    assert rows, "no run above has finished"
    if settings.device == "cuda":
        errors = {str(row["run"]): abs(float(str(row["forecast / measured"])) - 1) for row in rows}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= FORECAST_ERROR, f"{worst} is off by {100 * errors[worst]:.0f} %:\n" + str(rows)
    return table(rows)


def _run(settings: Settings, name: str, pair: list[str], ranks: int) -> list[str]:
    """Three steps by the command itself; returns the table of its steps and leaves forecast.json in its folder."""
    folder, tokens = settings.work / name, 16 if settings.tiny else 1024
    overrides = [
        *pair,
        f"name={name}",
        f"ranks={ranks}",
        f"device={settings.device}",
        "selector.retention=0.2",
        f"data.max_response_tokens={tokens}",
        "learner.num_steps=3",
        "learner.warmup_steps=0",
        "learner.prompts_per_step=4",
        "learner.samples_per_prompt=4",
        "learner.lr=1e-6",
        "eval.every=0",
        "eval.teacher=false",
        "eval.greedy=false",
        "eval.sequence_kl=false",
        "eval.samples=1",
        "eval.max_tokens=16",
        "eval.benchmarks.word_sums.num_problems=4",
        "logger=files",
        "logger.rollouts_per_eval=0",
    ]
    line = [sys.executable, "-m", "tip_exp", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(line, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, "\n".join(done.stderr.strip().splitlines()[-3:])
    steps = read_rows(folder / "metrics.jsonl")[1:]
    spans = [key for key in steps[-1] if key.startswith("time/")]
    rows: list[dict[str, Any]] = [
        {"step": step["step"], "loss": f"{step[names.LOSS]:.4f}", "mismatch": f"{step[names.MISMATCH_MEAN]:.2g}"}
        | {key.removeprefix("time/"): f"{step.get(key, 0.0):.2f}" for key in spans}
        for step in steps
    ]
    config = tiny.compose_run(*overrides)
    key = names.DEVICE_USED_PEAK_GIB if settings.device == "cuda" else names.PROCESS_PEAK_GIB
    measured, predicted = steps[-1][key], forecast_gib(config, settings.device)
    values = {"measured GiB": f"{measured:.2f}", "forecast GiB": f"{predicted:.2f}"}
    (folder / "forecast.json").write_text(json.dumps(values | {"forecast / measured": f"{predicted / measured:.3f}"}))
    return [f"`{' '.join(['tip-exp', *overrides[len(pair) :]])}`", "", *table(rows)]


def forecast_gib(config: RunConfig, device: str) -> float:
    card_gib = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else None
    return RankMemory(config, card_gib).peak()[1]


def _mismatch(model: torch.nn.Module, rollout: Rollout) -> float:
    """Mean |log-prob by the sampler - log-prob by the model itself| of the sampled tokens."""
    ids = torch.tensor([rollout.token_ids], device=next(model.parameters()).device)
    with torch.no_grad():
        logprobs = model(ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    of_sampled = logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu()
    sampled = torch.tensor(rollout.response_mask[1:])
    return float((of_sampled[sampled] - torch.tensor(rollout.sampler_logprobs)).abs().mean())


def _free_gib(device: torch.device) -> float:
    """Free memory of the GPU; nan on a CPU, where an engine does not sleep."""
    return torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else math.nan
