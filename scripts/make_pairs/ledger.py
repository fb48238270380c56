"""The pair `tiny_ledger`: a teacher that carries balances forward and a student that reads stale ones.

The student trains on the same ledgers as the teacher, except that 80 % of its lookups of a changed balance return the
one of the first line. Seeds, declared before the first training: 31 for the teacher, 32 for the student. The recipe and
the form of the ledgers were changed by training loss and validation accuracy; no token rule was run on the pair.
Measured: results/LOG.md, "The ledger pair".
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

# First weights with which copying a token works before it is trained: 4,000 names are too many to learn one by one.
MATRIX_STD, EMBEDDING_STD = 0.08, 0.3
COPY_SCALE = 0.5  # of v_proj's transpose, with which o_proj starts: a head writes what it reads
COPY_LOGIT = 12.0  # of a token whose embedding is the whole hidden state; the first norm is scaled for it
ROPE_THETA = 1e6  # as in Qwen3; more dimensions of a head compare tokens that are far apart
PIECES = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
_SIZES = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "batch_size": 8, "warmup_steps": 20}
RECIPES = {
    "teacher": Recipe(128, 256, slip=0.0, lr=4e-3, num_steps=1100, seed=31, **_SIZES),
    "student": Recipe(64, 128, slip=0.8, lr=4e-3, num_steps=800, seed=32, **_SIZES),
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


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A model whose heads copy what they attend to, for every name alike.

    The rows of the names in the (tied) embedding share one gradient, their mean, so that they keep their random
    differences. With gradients of their own, Adam moves the row of a name that no problem shows by about the learning
    rate at each step, however small the gradient is.
    """
    model = common.build_model(recipe, len(tokenizer), ROPE_THETA)
    std = model.config.initializer_range
    weights = dict(model.named_parameters())
    embedding = weights["model.embed_tokens.weight"]  # (vocab, width)
    with torch.no_grad():
        embedding.mul_(EMBEDDING_STD / std)
        weights["model.norm.weight"].fill_(COPY_LOGIT / (EMBEDDING_STD * recipe.hidden_size))
        for weight in weights.values():
            if weight.dim() == 2 and weight is not embedding:
                weight.mul_(MATRIX_STD / std)
        for name, weight in weights.items():
            if "o_proj" in name:
                weight.copy_(COPY_SCALE * weights[name.replace("o_proj", "v_proj")].T)
    is_name = torch.zeros(len(embedding), dtype=torch.bool)
    is_name[[tokenizer.encode(f" {name}")[0] for name in ledger.NAMES]] = True
    embedding.register_hook(lambda grad: torch.where(is_name[:, None], grad[is_name].mean(0), grad))
    return model


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The learning rate is constant for the first 70 % of the steps, then falls linearly to 5 %."""

    def decay(step: int) -> float:
        return min(1.0, 0.05 + 0.95 * (1 - step / recipe.num_steps) / 0.3)

    return common.pretrain(recipe, build_model(recipe, tokenizer), _batches(recipe, tokenizer), decay)


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Rollout]]:
    problems = ledger.stream("train", recipe.seed, slip=recipe.slip)
    while True:
        yield [common.example(problem, tokenizer) for problem in islice(problems, recipe.batch_size)]
