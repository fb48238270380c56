"""Tokens a second of vllm and of hf on the same prompts, in turns, in one process.

python -m benchmarks.rollout --model tiny=package:tiny/student --prompts 16 64 --out results/bench/rollout.csv
"""

from __future__ import annotations

import argparse
import csv
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path

import torch
from omegaconf import OmegaConf

from tip_exp.config.schema import ChatConfig, ModelConfig, PairConfig, RolloutConfig, StudentConfig, TeacherConfig
from tip_exp.data import word_sums
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.rollout.backends import choose
from tip_exp.types import Sampler, Sampling
from tip_exp.utils.paths import conf_dir

COLUMNS = ("backend", "model", "prompts", "samples", "max_tokens", "tokens_per_s", "startup_s")
BACKENDS = ("hf", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tiny = "tiny=package:tiny/student"
    parser.add_argument("--model", action="append", metavar="NAME=PATH", help=f"may be repeated; default {tiny}")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="responses a prompt")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[32, 72], help="responses may stop earlier")
    parser.add_argument("--shots", type=int, default=0, help="solved problems before each question, the same for all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each backend at each size, after a short one")
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
    prompts = [pair.prompt_ids(question) for question in questions(max(arguments.prompts), arguments.shots)]
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
            for backend, work in in_turns(samplers, prompts[:count], sampling, arguments.rounds).items():
                speed = round(work.tokens / work.seconds, 1)
                values = (backend, name, count, samples, tokens, speed, round(startup_s[backend], 2))
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), work, sep="  ", flush=True)
    return rows


@dataclass(slots=True)
class Work:
    """What a sampler wrote at one size, and what it took."""

    tokens: int = 0  # of responses, the stop tokens included
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process: on a busy machine the fairer measure, on CUDA none
    lengths: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        mean, longest = self.tokens / len(self.lengths), max(self.lengths)
        return f"({self.tokens / self.cpu_seconds:.1f} a CPU second; lengths {mean:.0f} in the mean, {longest} at most)"


def in_turns(
    samplers: dict[str, Sampler], prompts: list[list[int]], sampling: Sampling, rounds: int
) -> dict[str, Work]:
    """The work of each sampler over `rounds` turns; a first turn of each, of a few tokens, is not counted."""
    done = {name: Work() for name in samplers}
    for turn in range(rounds + 1):
        for name, sampler in samplers.items():
            sampler.sync()  # as in a run: new weights, nothing cached from the turn before
            if turn == 0:
                sampler.generate(prompts, replace(sampling, max_tokens=min(4, sampling.max_tokens)), seed=turn)
                continue
            started, busy = time.perf_counter(), time.process_time()
            rollouts = sampler.generate(prompts, sampling, seed=turn)
            done[name].seconds += time.perf_counter() - started
            done[name].cpu_seconds += time.process_time() - busy
            done[name].lengths += [rollout.num_response_tokens for rollout in rollouts]
            done[name].tokens = sum(done[name].lengths)
    return done


def questions(count: int, shots: int) -> list[str]:
    """Word problems, each behind the same `shots` solved ones."""
    solved = [f"{one.prompt}\n{one.solution}\n\n" for one in islice(word_sums.stream("validation", 0), shots)]
    return ["".join(solved) + problem.prompt for problem in islice(word_sums.stream("train", 0), count)]


def make(backend: str, pair: Pair, device: torch.device, arguments: argparse.Namespace, longest: int) -> Sampler:
    """A sampler as a run would have it, with the settings that ship, in the type that the other one has as well."""
    shipped = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml")["rollout"])
    assert isinstance(shipped, dict)
    shipped["backend"] = backend
    settings = RolloutConfig.model_validate(shipped)
    most = max(arguments.prompts) * max(arguments.samples)  # a larger KV cache would stay empty
    vllm = settings.vllm.model_copy(update={"dtype": arguments.dtype})
    settings = settings.model_copy(update={"vllm": vllm, "batch_size": min(most, settings.batch_size)})
    return choose(settings, device, arguments.dtype).make(pair.student, pair, settings, longest)


def write(rows: list[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def pair_of(model: ModelConfig) -> PairConfig:
    """The model as its own teacher: what loads and checks a pair also finds its stop ids."""
    teacher = TeacherConfig(**model.model_dump(), placement="resident")
    student = StudentConfig(**model.model_dump(), lora=None)
    teacher = TeacherConfig(**model.model_dump(), placement="resident")
    chat = ChatConfig(system=None, thinking=None, eval_thinking=None)
    return PairConfig(label="bench", attention="sdpa", chat=chat, privileged=None, teacher=teacher, student=student)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    main(parser.parse_args())
