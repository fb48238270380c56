"""Tokens a second of vllm and of hf on the same prompts, in turns, in one process.

python -m tip_exp.bench.rollout --model tiny=package:tiny/student --prompts 16 64 --out results/bench/rollout.csv
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from contextlib import ExitStack, closing
from itertools import islice, product
from pathlib import Path

import torch
from omegaconf import OmegaConf

from tip_exp.config import ChatConfig, ModelConfig, PairConfig, RolloutConfig, StudentConfig
from tip_exp.data import word_sums
from tip_exp.models import Pair, load_pair
from tip_exp.paths import conf_dir
from tip_exp.rollout.backends import choose
from tip_exp.rollout.types import Sampler, Sampling

COLUMNS = ("backend", "model", "prompts", "samples", "max_tokens", "tokens_per_s", "startup_s")
BACKENDS = ("hf", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tiny = "tiny=package:tiny/student"
    parser.add_argument("--model", action="append", metavar="NAME=PATH", help=f"may be repeated; default {tiny}")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="responses a prompt")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[32, 72], help="responses may stop earlier")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each backend at each size, after one to warm up"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, the same for both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/bench/rollout.csv"))


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    for named in arguments.model or ["tiny=package:tiny/student"]:
        name, _, path = named.rpartition("=")
        rows += measure(name or path, path, arguments)
        write(rows, arguments.out)  # after each model: the next may not fit
    print(f"{len(rows)} rows in {arguments.out}")


def measure(name: str, path: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one model: every size, both backends, which take turns so that a busy machine is unfair to neither."""
    device = torch.device(arguments.device)
    model = ModelConfig(path=path, revision=None, dtype=arguments.dtype)
    pair = load_pair(pair_of(model), device)
    problems = islice(word_sums.stream("train", 0), max(arguments.prompts))
    prompts = [pair.prompt_ids(problem.prompt) for problem in problems]
    longest = max(map(len, prompts)) + max(arguments.max_tokens)
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        samplers: dict[str, Sampler] = {}
        startup_s: dict[str, float] = {}
        for backend in BACKENDS:
            started = time.perf_counter()
            samplers[backend] = stack.enter_context(closing(make(backend, pair, device, arguments, longest)))
            startup_s[backend] = time.perf_counter() - started
        for count, samples, tokens in product(arguments.prompts, arguments.samples, arguments.max_tokens):
            sampling = Sampling(samples, 1.0, 1.0, 0, tokens)
            speeds = in_turns(samplers, prompts[:count], sampling, arguments.rounds)
            for backend, speed in speeds.items():
                values = (backend, name, count, samples, tokens, round(speed, 1), round(startup_s[backend], 2))
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def in_turns(
    samplers: dict[str, Sampler], prompts: list[list[int]], sampling: Sampling, rounds: int
) -> dict[str, float]:
    """Response tokens a second of each sampler, over `rounds` turns; a first turn of each is not counted."""
    tokens: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for turn in range(rounds + 1):
        for name, sampler in samplers.items():
            sampler.sync()  # as in a run: new weights, nothing cached from the turn before
            started = time.perf_counter()
            rollouts = sampler.generate(prompts, sampling, seed=turn)
            if turn > 0:
                seconds[name] += time.perf_counter() - started
                tokens[name] += sum(rollout.num_response_tokens for rollout in rollouts)
    return {name: tokens[name] / seconds[name] for name in samplers}


def make(backend: str, pair: Pair, device: torch.device, arguments: argparse.Namespace, longest: int) -> Sampler:
    """A sampler as a run would have it, with the settings that ship, in the type that the other one has as well."""
    shipped = OmegaConf.to_container(OmegaConf.load(conf_dir() / "rollout" / "auto.yaml"))
    assert isinstance(shipped, dict)
    shipped["backend"] = backend
    settings = RolloutConfig.model_validate(shipped)
    settings = settings.model_copy(update={"vllm": settings.vllm.model_copy(update={"dtype": arguments.dtype})})
    return choose(settings, device, arguments.dtype).make(pair.student, pair, settings, longest)


def write(rows: list[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def pair_of(model: ModelConfig) -> PairConfig:
    """The model as its own teacher: what loads and checks a pair also finds its stop ids."""
    student = StudentConfig(**model.model_dump(), lora=None)
    chat = ChatConfig(system=None, thinking=None, eval_thinking=None, thinking_may_differ=False)
    return PairConfig(label="bench", attention="sdpa", chat=chat, privileged=None, teacher=model, student=student)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    main(parser.parse_args())
