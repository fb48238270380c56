"""The pair `tiny_ledger`: a teacher that carries balances forward and a student that reads stale ones.

The student trains on the same ledgers as the teacher, except that 80 % of its lookups of a changed balance return the
one of the first line. Seeds, declared before the first training: 31 for the teacher, 32 for the student. The recipe and
the size of the ledgers were changed by training loss and validation accuracy; no token rule was run on the pair. The
teacher does not solve the task yet: results/LOG.md, "The ledger pair is not ready".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from scripts.make_pairs import common
from scripts.make_pairs.common import END, Recipe
from tip_exp.data import ledger
from tip_exp.types import Rollout

# Copying one of 4,000 names needs values of the embedding's whole width (as many key-value heads as fill it) and first
# weights of about 1 / sqrt(width): with transformers' 0.02 the names are not learned within the steps below.
INITIAL_SCALE = 4.0
PIECES = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
RECIPES = {
    "teacher": Recipe(
        128, 256, num_heads=4, num_kv_heads=4, slip=0.0, lr=4e-3, num_steps=700, seed=31, batch_size=8, warmup_steps=20
    ),
    "student": Recipe(
        64, 128, num_heads=4, num_kv_heads=4, slip=0.8, lr=4e-3, num_steps=600, seed=32, batch_size=8, warmup_steps=20
    ),
}


def make(role: str, out: Path) -> None:
    """Pretrain the teacher or the student on one thread and write its Hugging Face folder, `out`/`role`."""
    torch.set_num_threads(1)
    recipe, tokenizer = RECIPES[role], build_tokenizer()
    model = pretrain(recipe, tokenizer)
    model.save_pretrained(out / role)
    tokenizer.save_pretrained(out / role)
    problems = list(islice(ledger.stream("validation", seed=0), 512))
    score = {"validation_greedy_512": common.greedy_accuracy(model, tokenizer, problems, 160)}
    common.write_record(out / role, "ledger", recipe, model, score)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on every name and 500 problems of the train split until each word is one token."""
    problems = islice(ledger.stream("train", 0), 500)
    texts = [f"{common.prompt(problem)}{problem.solution}{END}\n" for problem in problems]
    return common.build_tokenizer([*texts, *(f" {name}" for name in ledger.NAMES)], PIECES, 8192)


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The learning rate is constant for the first half of the steps, then falls linearly to 5 %."""

    def decay(step: int) -> float:
        return min(1.0, 0.05 + 1.9 * (1 - step / recipe.num_steps))

    return common.pretrain(recipe, len(tokenizer), _batches(recipe, tokenizer), decay, INITIAL_SCALE)


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Rollout]]:
    problems = ledger.stream("train", recipe.seed, slip=recipe.slip)
    while True:
        yield [common.example(problem, tokenizer) for problem in islice(problems, recipe.batch_size)]
