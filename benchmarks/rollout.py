"""Sampled tokens per second of the backends vllm and hf on the same prompts, in turns within one process."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path

import torch

from benchmarks import measuring, tiny
from tip_exp.config.schema import RolloutConfig
from tip_exp.data import word_sums
from tip_exp.models.load import load_pair
from tip_exp.rollout.backends import choose
from tip_exp.types import Sampler, Sampling

DEFAULT_MODEL = "tiny=package:tiny/student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one size: 8 prompts, 1 sample, 16 tokens, one round")
    parser.add_argument(
        "--model", action="append", metavar="NAME=PATH", help=f"may be repeated; default {DEFAULT_MODEL}"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="responses per prompt")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[32, 72], help="longest response")
    parser.add_argument("--shots", type=int, default=0, help="solved problems before each question, a shared prefix")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, after a short one that is not recorded")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both backends")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/bench/rollout.csv"))


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.prompts, arguments.samples, arguments.max_tokens, arguments.rounds = [8], [1], [16], 1
    backends = ["hf", "vllm"]
    if measuring.missing(["vllm"]):
        print("not installed: vllm (pip install 'tip_exp[vllm]'); its rows are left out", file=sys.stderr)
        backends = ["hf"]
    rows: list[measuring.Row] = []
    for named_path in arguments.model or [DEFAULT_MODEL]:
        name, _, path = named_path.rpartition("=")
        options = name or path, path, backends, arguments
        rows += measuring.in_child(measure_model, *options, threads=arguments.threads)  # a process has one engine
        measuring.write_csv(rows, arguments.out)  # after each model, since the next may run out of memory
    print(f"{len(rows)} rows in {arguments.out}")


def measure_model(name: str, path: str, backends: list[str], arguments: argparse.Namespace) -> list[measuring.Row]:
    """Rows of one model: every size with every backend."""
    device = torch.device(arguments.device)
    # The model is its own teacher: loading a pair also finds the stop ids.
    model = [
        f"pair.{role}.{key}"
        for role in ("teacher", "student")
        for key in (f"path='{path}'", f"dtype={arguments.dtype}")
    ]
    pair = load_pair(tiny.compose_run(*model).pair, device)
    prompts = [pair.prompt_ids(question) for question in questions(max(arguments.prompts), arguments.shots)]
    max_length = max(map(len, prompts)) + max(arguments.max_tokens)
    # A KV cache for more sequences than the largest size has would stay empty.
    max_num_seqs = max(arguments.prompts) * max(arguments.samples)
    rows: list[measuring.Row] = []
    with ExitStack() as stack:
        samplers: dict[str, Sampler] = {}
        startup_s: dict[str, float] = {}
        for backend in backends:
            config = rollout_config(backend, arguments.dtype, max_num_seqs)
            started = time.perf_counter()
            sampler = choose(config, device, arguments.dtype).make(pair.student, pair, config, max_length)
            samplers[backend] = stack.enter_context(closing(sampler))
            startup_s[backend] = time.perf_counter() - started
        for count, samples, max_tokens in product(arguments.prompts, arguments.samples, arguments.max_tokens):
            sampling = Sampling(samples, 1.0, 1.0, 0, max_tokens)
            for backend, totals in sample_in_turns(samplers, prompts[:count], sampling, arguments.rounds).items():
                row: measuring.Row = {
                    "backend": backend,
                    "model": name,
                    "prompts": count,
                    "samples": samples,
                    "max_tokens": max_tokens,
                    "tokens_per_s": round(totals.tokens / totals.wall_s, 1),
                    "startup_s": round(startup_s[backend], 2),
                }
                measuring.print_row(row)
                rows.append(row)
                print(f"    {totals}", flush=True)
    return rows


@dataclass(slots=True)
class Totals:
    """Sums over the rounds of one sampler at one size."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of this process; the fairer measure on a busy machine without a GPU
    lengths: list[int] = field(default_factory=list)  # of responses, in tokens, stop tokens included

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def __str__(self) -> str:
        mean_length = self.tokens / len(self.lengths)
        per_cpu_second = self.tokens / self.cpu_s
        lengths = f"mean {mean_length:.0f}, max {max(self.lengths)}"
        return f"{per_cpu_second:.1f} tokens per CPU second; response length: {lengths}"


def sample_in_turns(
    samplers: dict[str, Sampler], prompts: list[list[int]], sampling: Sampling, rounds: int
) -> dict[str, Totals]:
    """Totals of each sampler over `rounds` rounds, after a warm-up of a few tokens."""
    totals = {name: Totals() for name in samplers}
    for round_number in range(rounds + 1):
        for name, sampler in samplers.items():
            sampler.sync()  # new weights and an empty prefix cache, as after each step of a run
            if round_number == 0:
                sampler.generate(prompts, replace(sampling, max_tokens=min(4, sampling.max_tokens)), seed=0)
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            rollouts = sampler.generate(prompts, sampling, seed=round_number)
            totals[name].wall_s += time.perf_counter() - wall
            totals[name].cpu_s += time.process_time() - cpu
            totals[name].lengths += [rollout.num_response_tokens for rollout in rollouts]
    return totals


def questions(count: int, shots: int) -> list[str]:
    """Word problems, each after the same `shots` solved problems."""
    solved = [f"{p.prompt}\n{p.solution}\n\n" for p in islice(word_sums.stream("validation", 0), shots)]
    return ["".join(solved) + problem.prompt for problem in islice(word_sums.stream("train", 0), count)]


def rollout_config(backend: str, dtype: str, max_num_seqs: int) -> RolloutConfig:
    """The shipped settings of a run, with the same dtype for both backends."""
    config = tiny.compose_run(f"rollout.backend={backend}").rollout
    vllm = config.vllm.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"vllm": vllm, "batch_size": min(max_num_seqs, config.batch_size)})
