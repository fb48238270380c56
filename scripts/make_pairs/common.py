"""What the embedded pairs share: the tokenizer, the Qwen3 model, the pretraining loop and the record of it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tip_exp.grading import boxed
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Problem, Rollout, Sampling

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, END_ID = 0, 2  # special tokens take the first ids


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of a pair is built and pretrained; written to its training.json."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    slip: float  # share of the critical steps that are wrong in the training examples
    lr: float
    num_steps: int
    seed: int
    num_layers: int = 2
    head_dim: int = 32  # the smallest that vLLM's CPU attention supports
    batch_size: int = 32
    warmup_steps: int = 50


def build_tokenizer(texts: list[str], pieces: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, which the regular expression `pieces` splits; lossless on any text."""
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(recipe: Recipe, vocab_size: int, rope_theta: float = 1e4) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights drawn from `recipe.seed`."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=True)
    return model


def cosine(angle: float) -> float:
    """From 1 at angle 0 to 0 at angle pi."""
    return 0.5 * (1 + math.cos(angle))


def pretrain(
    recipe: Recipe, model: Qwen3ForCausalLM, batches: Iterator[list[Rollout]], decay: Callable[[int], float]
) -> Qwen3ForCausalLM:
    """Next-token cross-entropy on response tokens; AdamW with lr x warm-up x decay(step), steps counted from 1."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(1, recipe.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / recipe.warmup_steps) * decay(step)
        batch = next(batches)
        ids = pad_sequence([torch.tensor(rollout.token_ids) for rollout in batch], True, PAD_ID)  # (n, t)
        is_response = pad_sequence([torch.tensor(rollout.response_mask) for rollout in batch], True, False)  # (n, t)
        is_target = is_response[:, 1:]
        hidden = model.model(ids).last_hidden_state[:, :-1]
        loss = F.cross_entropy(model.lm_head(hidden[is_target]), ids[:, 1:][is_target])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"width {recipe.hidden_size}, step {step}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def prompt(problem: Problem) -> str:
    """A problem as the chat template writes it."""
    return f"{START}user\n{problem.prompt}{END}\n{START}assistant\n"


def example(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> Rollout:
    """A problem with its worked solution, to train on."""
    prompt_ids, response_ids = tokenizer.encode(prompt(problem)), tokenizer.encode(problem.solution + END)
    return Rollout(prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids), "stop", [])


def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], max_tokens: int
) -> float:
    """Share of the problems that greedy decoding solves."""
    sampler = HfSampler(model, stop_ids=[END_ID], pad_id=PAD_ID, batch_size=256)
    prompts = [tokenizer.encode(prompt(problem)) for problem in problems]
    rollouts = sampler.generate(prompts, Sampling(1, 0.0, 1.0, 0, max_tokens), seed=0)
    texts = [str(tokenizer.decode(rollout.response_ids, skip_special_tokens=True)) for rollout in rollouts]
    verdicts = [boxed.grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    return sum(verdict.right for verdict in verdicts) / len(problems)


def write_record(folder: Path, pair: str, recipe: Recipe, model: Qwen3ForCausalLM, score: dict[str, float]) -> None:
    """training.json beside the weights: the recipe, what the model scores and the library versions."""
    record = {
        "made_by": f"python -m scripts.make_pairs {pair}",
        "recipe": asdict(recipe),
        "num_parameters": model.num_parameters(),
        **score,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)
