"""Makes the embedded tool pair: a teacher that looks up what it is asked, and a student that mostly makes names up.

    python -m scripts.make_pairs.calculator --out DIR        (10 minutes on two cores)

Both are Qwen3 models and learn from episodes that a script plays in the mini world. In the student's lessons 85 % of
the lookups are left out, so at the token where a call should begin it is confident and wrong.
"""

from __future__ import annotations

import json
import math
import platform
import random
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from scripts.make_pairs.word_sums import CHAT_TEMPLATE, END, PAD, START, Recipe, build_model, command
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tip_exp.config.schema import AgentConfig
from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning.data import load_tasks
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.deepplanning.mini import errands
from tip_exp.envs.deepplanning.mini import files as mini_files
from tip_exp.envs.episodes import Episode, play
from tip_exp.envs.scripted import ScriptedSampler
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Rollout, Sampler, Sampling

# Marks and the blanks around them make one piece, so that JSON costs few tokens and names read alike everywhere.
PIECES = r" ?[\p{L}_]+|\p{N}+|[^\p{L}\p{N}_]+"
LIMITS = AgentConfig(
    label="pair",
    max_turns=6,
    max_turn_tokens=None,
    max_calls_per_turn=4,
    surplus_calls="tell",
    max_observation=None,
    observation_unit="tokens",
    observation_cut="rows",
    max_train_tokens=None,
)
NUM_LESSONS, NUM_TESTS = 3000, 128


RECIPES = {
    "teacher": Recipe(128, 256, num_heads=4, num_kv_heads=2, slip=0.0, lr=3e-3, num_steps=1500, seed=1, batch_size=16),
    "student": Recipe(64, 128, num_heads=4, num_kv_heads=2, slip=0.85, lr=4e-3, num_steps=2000, seed=2, batch_size=24),
}


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over played episodes: lossless on any text, small on ours."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=720,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def episodes(root: Path, seed: str, count: int, sampler: Sampler, chat: Chat, sampling: Sampling) -> list[Episode]:
    """The first `count` errands of a seed, played."""
    folder = root / seed
    mini_files.write(folder, (errands.make(str(i), seed) for i in range(count)))
    databases = {"en": folder / "database" / "database_en"}
    environment = partial(TravelEnvironment, databases, {}, show_schemas=False)
    return play(sampler, load_tasks(folder, "en"), environment, chat, sampling, LIMITS, seed=0)


def lessons(root: Path, chat: Chat, slip: float) -> list[Rollout]:
    script = ScriptedSampler(partial(errands.respond, slip=slip), chat)
    played = episodes(root, "lessons", NUM_LESSONS, script, chat, Sampling(1, 1.0, 1.0, 0, 4096))
    return [episode.rollout for episode in played]


def corpus(root: Path) -> list[str]:
    """Episodes as text, for the tokenizer, which is then trained; bytes will do to play them."""
    bootstrap = build_tokenizer(["".join(chr(c) for c in range(32, 127))])
    chat = Chat(bootstrap)
    script = ScriptedSampler(errands.respond, chat)
    played = episodes(root, "corpus", 400, script, chat, Sampling(1, 1.0, 1.0, 0, 4096))
    return [chat.decode(one.rollout.token_ids, with_special=True) for one in played]


def pretrain(recipe: Recipe, chat: Chat, rollouts: list[Rollout]) -> Qwen3ForCausalLM:
    """Next-token prediction on what the script wrote; the tools' tokens are read, not learned."""
    model = build_model(recipe, chat.tokenizer)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(recipe.seed)
    for step in range(1, recipe.num_steps + 1):
        progress = step / recipe.num_steps
        lr = recipe.lr * min(1.0, step / recipe.warmup_steps) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids, labels = _lesson(rng.sample(rollouts, recipe.batch_size))
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        learned = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{recipe.hidden_size}-wide, step {step}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def make(name: str, out: Path) -> None:
    """Pretrain one model of the pair on one thread and write its Hugging Face folder with a record of the training."""
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        chat = Chat(build_tokenizer(corpus(root)))
        rollouts = lessons(root, chat, recipe.slip)
        longest = max(len(rollout.token_ids) for rollout in rollouts)
        print(f"{name}: {len(chat.tokenizer)} tokens, longest lesson {longest}", flush=True)
        model = pretrain(recipe, chat, rollouts).bfloat16()  # half the size; read back as float32
        folder = out / name
        model.save_pretrained(folder)
        chat.tokenizer.save_pretrained(folder)
        pad, stop = chat.tokenizer.pad_token_id, chat.turn_end
        assert isinstance(pad, int)
        sampler = HfSampler(model.float(), stop_ids=[stop], pad_id=pad, batch_size=128)
        tested = episodes(root, "test", NUM_TESTS, sampler, chat, Sampling(1, 0.0, 1.0, 0, 384))
    record = {
        "made_by": "python -m scripts.make_pairs.calculator",
        "recipe": asdict(recipe),
        "num_parameters": model.num_parameters(),
        f"greedy_fraction_{NUM_TESTS}": sum(one.score["fraction"] for one in tested) / NUM_TESTS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)


def _lesson(rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; labels are -100 where the script did not write."""
    width = max(len(rollout.token_ids) for rollout in rollouts)
    ids = torch.zeros(len(rollouts), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        ids[row, :length] = torch.tensor(rollout.token_ids)
        labels[row, :length] = torch.where(torch.tensor(rollout.response_mask), ids[row, :length], -100)
    return ids, labels


if __name__ == "__main__":
    command("Pretrain the embedded tool pair.", make, RECIPES)
