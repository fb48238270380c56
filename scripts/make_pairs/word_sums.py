"""Makes the embedded pair: a byte-level tokenizer, a teacher that can do word sums and a student with a planted slip.

    python -m scripts.make_pairs.word_sums --out DIR        (3 minutes on two cores; same files each time on one machine)

Both are Qwen3 models. The student sees the same stories as the teacher, but where a subtraction borrows its lessons are
wrong 80 % of the time: it becomes confident and wrong there, the tokens the paper calls Q3.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tip_exp.data import word_sums
from tip_exp.grading import boxed
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Problem, Sampling

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Digits stand alone, as in Qwen's tokenizer, so that a carry is one wrong token.
PIECES = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of the pair is built and pretrained."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    slip: float  # share of borrowing subtractions that its lessons get wrong
    lr: float
    num_steps: int
    seed: int
    num_layers: int = 2
    head_dim: int = 32  # the smallest that vLLM's CPU attention takes
    batch_size: int = 32
    warmup_steps: int = 50


RECIPES = {
    "teacher": Recipe(128, 256, num_heads=4, num_kv_heads=2, slip=0.0, lr=3e-3, num_steps=1200, seed=1),
    "student": Recipe(64, 128, num_heads=2, num_kv_heads=1, slip=0.8, lr=4e-3, num_steps=1200, seed=2),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over 3,000 training stories: lossless on any text, small on ours."""
    corpus = [f"{START}user\n{p.prompt}{END}\n{START}assistant\n{p.solution}{END}\n" for p in _stories(0, 3000, 0.0)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    pad, stop = _special_ids(tokenizer)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad, do_sample=True)
    return model


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Next-token cross-entropy on the worked solutions; AdamW, warm-up, cosine to 10 %."""
    model = build_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98))
    stories = word_sums.stream("train", recipe.seed, slip=recipe.slip)
    for step in range(1, recipe.num_steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / recipe.warmup_steps) * (0.1 + 0.9 * cosine)
        ids, labels = _lesson(tokenizer, list(islice(stories, recipe.batch_size)))
        hidden = model.model(ids).last_hidden_state[:, :-1]
        taught = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[taught]), labels[:, 1:][taught])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 150 == 0:
            print(f"{recipe.hidden_size}-wide, step {step}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> float:
    """Exact-match accuracy on the first test problems, greedy."""
    problems = list(islice(word_sums.stream("test", seed=0), num_problems))
    pad, stop = _special_ids(tokenizer)
    sampler = HfSampler(model, stop_ids=[stop], pad_id=pad, batch_size=256)
    rollouts = sampler.generate([_prompt_ids(tokenizer, p) for p in problems], Sampling(1, 0.0, 1.0, 0, 80), seed=0)
    texts = [str(tokenizer.decode(r.response_ids, skip_special_tokens=True)) for r in rollouts]
    verdicts = [boxed.grade(text, p.answer) for text, p in zip(texts, problems, strict=True)]
    return sum(v.right for v in verdicts) / num_problems


def make(name: str, out: Path) -> None:
    """Pretrain one model of the pair on one thread and write its Hugging Face folder with a record of the training."""
    torch.set_num_threads(1)
    tokenizer, recipe = build_tokenizer(), RECIPES[name]
    model = pretrain(recipe, tokenizer)
    folder = out / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "made_by": "python -m scripts.make_pairs.word_sums",
        "recipe": asdict(recipe),
        "num_parameters": model.num_parameters(),
        "greedy_accuracy_512": greedy_accuracy(model, tokenizer, 512),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: {record['num_parameters']:,} parameters, greedy accuracy {record['greedy_accuracy_512']:.3f}")


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Ids of PAD and END."""
    pad, stop = (tokenizer.convert_tokens_to_ids(token) for token in (PAD, END))
    assert isinstance(pad, int) and isinstance(stop, int)
    return pad, stop


def _stories(seed: int, count: int, slip: float) -> list[Problem]:
    return list(islice(word_sums.stream("train", seed, slip=slip), count))


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> list[int]:
    return tokenizer.encode(f"{START}user\n{problem.prompt}{END}\n{START}assistant\n")


def _lesson(tokenizer: PreTrainedTokenizerFast, stories: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; labels are -100 on prompt and padding."""
    prompts = [_prompt_ids(tokenizer, story) for story in stories]
    answers = [tokenizer.encode(story.solution + END) for story in stories]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(stories), width), _special_ids(tokenizer)[0])
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def command(description: str, make: Callable[[str, Path], None], names: Iterable[str]) -> None:
    """The program: make(name, folder) for each model, each in a process of its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/ and student/")
    out: Path = parser.parse_args().out
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a model: the sums are then made in one order
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=make, args=(name, out)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [w.name for w in workers if w.exitcode != 0]:
        raise SystemExit(f"pretraining failed in {', '.join(failed)}")


if __name__ == "__main__":
    command("Pretrain the embedded teacher and student.", make, RECIPES)
