"""The embedded pair `tiny`: a teacher that solves word sums and a student with a planted mistake.

The student trains on the same stories as the teacher, except that 80 % of its subtractions that borrow are wrong. So it
is confident and wrong there: the tokens that the paper calls Q3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from scripts.make_pairs import common
from scripts.make_pairs.common import END, Recipe
from tip_exp.data import word_sums
from tip_exp.types import Rollout

# Each digit is one token, as in Qwen's tokenizer, so that a wrong borrow is one wrong token.
PIECES = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
RECIPES = {
    "teacher": Recipe(128, 256, num_heads=4, num_kv_heads=2, slip=0.0, lr=3e-3, num_steps=1200, seed=1),
    "student": Recipe(64, 128, num_heads=2, num_kv_heads=1, slip=0.8, lr=4e-3, num_steps=1200, seed=2),
}


def make(role: str, out: Path) -> None:
    """Pretrain the teacher or the student on one thread and write its Hugging Face folder, `out`/`role`."""
    _make(RECIPES[role], out / role, "word_sums")


def make_student(index: int, out: Path) -> None:
    """Pretrain student `index` of the pair tiny_students into `out`/`index`; student 0 is the shipped one."""
    recipe = RECIPES["student"]
    _make(replace(recipe, seed=recipe.seed + index), out / str(index), "students")


def _make(recipe: Recipe, folder: Path, pair: str) -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = pretrain(recipe, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    score = {"validation_greedy_512": greedy_accuracy(model, tokenizer, 512)}
    common.write_record(folder, pair, recipe, model, score)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on 3,000 stories of the train split."""
    stories = islice(word_sums.stream("train", 0, slip=0.0), 3000)
    return common.build_tokenizer([f"{common.prompt(story)}{story.solution}{END}\n" for story in stories], PIECES, 448)


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The learning rate decays to 10 % along a cosine."""

    def decay(step: int) -> float:
        return 0.1 + 0.9 * common.cosine(math.pi * step / recipe.num_steps)

    model = common.build_model(recipe, len(tokenizer))
    return common.pretrain(recipe, model, _batches(recipe, tokenizer), decay)


def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> float:
    """Share of the first validation problems that greedy decoding solves: recipes are chosen by it, never by test."""
    problems = list(islice(word_sums.stream("validation", seed=0), num_problems))
    return common.greedy_accuracy(model, tokenizer, problems, 80)


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Rollout]]:
    stories = word_sums.stream("train", recipe.seed, slip=recipe.slip)
    while True:
        yield [common.example(story, tokenizer) for story in islice(stories, recipe.batch_size)]
