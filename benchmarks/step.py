"""Time and memory of a whole optimizer step, with each loss in the same learner.

Pairs: the embedded one with its own rollouts, and a random one with the shape of Qwen3-0.6B (vocabulary 151,936, width
1,024) and few layers. For `trl` and `trl_best`, TRL's function replaces the loss; everything else is the same. Memory
is the peak above weights and optimizer state, minus one gradient of every parameter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import measuring, tiny
from benchmarks.implementations import TRL_BEST_TILE, TRL_DEFAULT_TILE, trl_divergence
from tip_exp.learner.learner import Learner
from tip_exp.learner.teacher import Teacher
from tip_exp.losses import BACKENDS, LossAndGrad
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import LazyLogits
from tip_exp.models.load import make_head
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB

PAIRS = ("tiny", "qwen3_0p6b_shape")
# (implementation, retention), measured in turns. TRL's function takes no mask, so it runs at retention 1 only.
TURNS = (
    ("fused", 1.0),
    ("materialized", 1.0),
    ("trl", 1.0),
    ("trl_best", 1.0),
    ("fused", 0.2),
    ("materialized", 0.2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the embedded pair only, 16 rollouts, two rounds")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rollouts", type=int, default=64, help="per step of the embedded pair")
    parser.add_argument("--layers", type=int, default=2, help="of the random pair; Qwen3-0.6B has 28")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens per step of the random pair")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, after one that is not recorded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/step.csv"))


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.pairs, arguments.rollouts, arguments.rounds = ["tiny"], 16, 2
    turns = TURNS
    if absent := measuring.missing(["trl"]):
        measuring.warn_missing(absent, "its rows are left out")
        turns = tuple(turn for turn in TURNS if not turn[0].startswith("trl"))
    rows: list[measuring.Row] = []
    for name in arguments.pairs:
        size = arguments.rollouts if name == "tiny" else arguments.tokens
        options = name, size, arguments.layers, turns, arguments.rounds
        rows += measuring.in_child(measure_pair, *options, threads=arguments.threads)
        measuring.write_csv(rows, arguments.out)
    print(f"{len(rows)} rows in {arguments.out}")


def measure_pair(
    name: str, size: int, layers: int, turns: tuple[tuple[str, float], ...], rounds: int
) -> list[measuring.Row]:
    """Rows of one pair; `size` is the rollouts of the embedded pair or the response tokens of the random one."""
    if name == "tiny":
        pair = tiny.load()
        prompt_ids = [pair.prompt_ids(prompt) for prompt in tiny.prompts(size, 0)]
        rollouts = tiny.make_sampler(pair).generate(prompt_ids, tiny.TRAIN_SAMPLING, seed=0)
    else:
        pair, rollouts = random_pair(layers), random_rollouts(size)
    config = tiny.learner_config(lr=1e-6)  # so that the model hardly changes between rounds
    learner = Learner(pair, tiny.selector(1.0), config, seed=0, meter=Meter(torch.device("cpu")))
    selectors = {retention: tiny.selector(retention) for _, retention in turns}
    gradients_mib = sum(p.nbytes for p in learner.parameters) / MIB
    rows: list[measuring.Row] = []
    with patch.dict(BACKENDS, {"trl": _trl_backend(TRL_DEFAULT_TILE), "trl_best": _trl_backend(TRL_BEST_TILE)}):
        for round_number in range(rounds + 1):
            for implementation, retention in turns:
                learner.config = config.model_copy(update={"loss_backend": implementation})
                learner.selector = selectors[retention]
                cost = step_cost(learner, rollouts)
                if round_number == 0:
                    continue  # loads libraries and creates the optimizer's state
                row: measuring.Row = {
                    "implementation": implementation,
                    "pair": name,
                    "tokens": sum(rollout.num_response_tokens for rollout in rollouts),
                    "vocab": pair.student.head.vocab_size,
                    "retention": retention,
                    "peak_extra_mib": round(max(0.0, cost.peak_extra_mib - gradients_mib), 1),
                    "cpu_s": round(cost.cpu_s, 4),
                    "wall_s": round(cost.wall_s, 4),
                }
                measuring.print_row(row)
                rows.append(row)
    return rows


def step_cost(learner: Learner, rollouts: list[Rollout]) -> measuring.Cost:
    learner.optimizer.zero_grad(set_to_none=True)
    teacher = Teacher(learner.pair, learner.config, learner.meter)
    return measuring.cost_of(lambda: learner.step(10, rollouts, teacher.hidden(rollouts)))[0]


def random_pair(layers: int) -> Pair:
    """Random weights in the shape of Qwen3-0.6B with `layers` layers; the tokenizer is the embedded pair's."""
    embedded = tiny.load()
    models: list[Model] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
        module = Qwen3ForCausalLM(config).eval()
        models.append(Model(module, make_head(module, config.vocab_size)))
    teacher, student = models
    teacher.module.requires_grad_(False)
    return replace(embedded, vocab_size=151_936, teacher=teacher, student=student)


def random_rollouts(tokens: int, count: int = 8, prompt_length: int = 16) -> list[Rollout]:
    """`count` rollouts with `tokens` response tokens in all, rounded down to a multiple of `count`."""
    g = torch.Generator().manual_seed(0)
    length = max(1, tokens // count)
    ids = torch.randint(151_936, (count, prompt_length + length), generator=g).tolist()
    return [Rollout(row, [False] * prompt_length + [True] * length, "length", []) for row in ids]


def _trl_backend(tile: tuple[int, int]) -> Callable[..., LossAndGrad]:
    """TRL 1.16's function with the signature of a loss backend."""

    def loss(
        student: LazyLogits, teacher: LazyLogits, kept: Tensor, divergence: Divergence, tile_bytes: int, **_: object
    ) -> LossAndGrad:
        assert divergence.name == "reverse_kl" and len(student.head.weight) == len(teacher.head.weight)
        hidden = student.hidden.detach().requires_grad_()
        per_token = trl_divergence(hidden, student.head.weight, teacher.hidden, teacher.head.weight, tile)
        value = (per_token * kept).sum()
        value.backward()
        assert hidden.grad is not None
        return LossAndGrad(value.detach(), hidden.grad)

    return loss
