"""`tip-bench step`: a whole optimizer step of the learner, with each loss in the same backbone.

Pairs: the embedded one with rollouts of its own, and a random one in the shape of Qwen3-0.6B (vocabulary 151,936, width
1,024) with few layers. TRL's function takes the place of the loss; scoring and selection are ours in every row.
Memory is the peak above weights and optimizer state, less one gradient of every parameter.
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
from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.learner import Learner
from tip_exp.learner.teacher import Teacher
from tip_exp.losses import BACKENDS
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.fused import LossAndGrad
from tip_exp.losses.head import Head
from tip_exp.models.load import make_head
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB

COLUMNS = ("implementation", "pair", "tokens", "vocab", "retention", "peak_extra_mib", "cpu_s", "wall_s")
PAIRS = ("tiny", "qwen3_0p6b_shape")
# implementation, retention; TRL's loss at full tokens, for its kernel knows no selection.
TURNS = (
    ("fused", 1.0),
    ("materialized", 1.0),
    ("trl", 1.0),
    ("trl_best", 1.0),
    ("fused", 0.2),
    ("materialized", 0.2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the embedded pair alone, 16 rollouts, two rounds")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rollouts", type=int, default=64, help="a step's, of the embedded pair")
    parser.add_argument("--layers", type=int, default=2, help="of the random pair; Qwen3-0.6B has 28")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens of the random pair's step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/step.csv"))


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.pairs, arguments.rollouts, arguments.rounds = ["tiny"], 16, 2
    turns = TURNS
    if absent := measuring.missing(["trl"]):
        measuring.tell_missing(absent, "its rows are left out")
        turns = tuple(turn for turn in TURNS if not turn[0].startswith("trl"))
    rows: list[dict[str, object]] = []
    for name in arguments.pairs:
        size = arguments.rollouts if name == "tiny" else arguments.tokens
        rows += measuring.in_child(
            measure, name, size, arguments.layers, turns, arguments.rounds, arguments.threads, threads=arguments.threads
        )
        measuring.write_csv(rows, COLUMNS, arguments.out)
    print(f"{len(rows)} rows in {arguments.out}")


def measure(
    name: str, size: int, layers: int, turns: tuple[tuple[str, float], ...], rounds: int, threads: int
) -> list[dict[str, object]]:
    """Rows of one pair: the turns follow each other `rounds` times; one more at first loads and is not counted."""
    torch.set_num_threads(threads)
    if name == "tiny":
        pair = tiny.load()
        ids = [pair.prompt_ids(prompt) for prompt in tiny.prompts(size, 0)]
        rollouts = tiny.sampler_of(pair).generate(ids, tiny.training_sampling(), seed=0)
    else:
        pair, rollouts = random_pair(layers), random_rollouts(size)
    settings = tiny.learner_settings(lr=1e-6)  # the model hardly moves between rounds
    learner = Learner(pair, tiny.selector(1.0), settings, seed=0, meter=Meter(torch.device("cpu")))
    gradients_mib = sum(p.nbytes for p in learner.parameters) / MIB
    rows: list[dict[str, object]] = []
    others = {"trl": _trl(TRL_DEFAULT_TILE), "trl_best": _trl(TRL_BEST_TILE)}
    with patch.dict(BACKENDS, others):
        for turn in range(rounds + 1):
            for implementation, retention in turns:
                cost = step_cost(learner, settings, implementation, retention, rollouts)
                values = (
                    implementation,
                    name,
                    sum(rollout.num_response_tokens for rollout in rollouts),
                    pair.student.head.vocab_size,
                    retention,
                    round(max(0.0, cost.peak_extra_mib - gradients_mib), 1),
                    round(cost.cpu_s, 4),
                    round(cost.wall_s, 4),
                )
                if turn > 0:
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
                    print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def step_cost(
    learner: Learner, settings: LearnerConfig, implementation: str, retention: float, rollouts: list[Rollout]
) -> measuring.Cost:
    learner.config = settings.model_copy(update={"loss_backend": implementation})
    learner.selector = tiny.selector(retention)
    learner.optimizer.zero_grad(set_to_none=True)
    teacher = Teacher(learner.pair, learner.config, learner.meter)
    return measuring.cost_of(lambda: learner.step(10, rollouts, teacher.hidden(rollouts)))[0]


def random_pair(layers: int) -> Pair:
    """Teacher and student of Qwen3-0.6B's shape but for the layers' number; the embedded pair's tokenizer stands in."""
    stand_in = tiny.load()
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
    return replace(stand_in, vocab_size=151_936, teacher=teacher, student=student)


def random_rollouts(tokens: int, count: int = 8, prompt: int = 16) -> list[Rollout]:
    """`tokens` response tokens in `count` rollouts."""
    g = torch.Generator().manual_seed(0)
    length = max(1, tokens // count)
    ids = torch.randint(151_936, (count, prompt + length), generator=g).tolist()
    return [Rollout(row, [False] * prompt + [True] * length, "length", []) for row in ids]


def _trl(tile: tuple[int, int]) -> Callable[..., LossAndGrad]:
    """TRL 1.16's function behind the signature of a loss backend."""

    def loss(
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        kept: Tensor,
        student_head: Head,
        teacher_head: Head,
        divergence: Divergence,
        tile_bytes: int,
        **_: object,
    ) -> LossAndGrad:
        assert divergence.kind == "reverse_kl" and len(student_head.weight) == len(teacher_head.weight)
        hidden = student_hidden.detach().requires_grad_()
        per_token = trl_divergence(hidden, student_head.weight, teacher_hidden, teacher_head.weight, tile)
        value = (per_token * kept).sum()
        value.backward()
        assert hidden.grad is not None
        return LossAndGrad(value.detach(), hidden.grad)

    return loss
