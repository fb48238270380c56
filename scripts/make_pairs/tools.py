"""The embedded pair `tiny_tools`: a teacher that looks names up with tools and a student that mostly invents them.

Both train on episodes that a script plays in the generated mini world. In the student's episodes 85 % of the lookups
are left out, so at the token where a tool call should begin it is confident and wrong.
"""

from __future__ import annotations

import math
import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from scripts.make_pairs import common
from scripts.make_pairs.common import END_ID, PAD_ID, Recipe
from scripts.make_pairs.scripted import ScriptedSampler, respond
from tip_exp.config.schema import AgentConfig
from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning import errands
from tip_exp.envs.deepplanning.data import load_tasks
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.episodes import Episode, play
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Rollout, Sampler, Sampling

# A run of punctuation and spaces is one piece, so that JSON takes few tokens and names tokenize alike everywhere.
PIECES = r" ?[\p{L}_]+|\p{N}+|[^\p{L}\p{N}_]+"
LIMITS = AgentConfig(
    max_turns=6,
    max_calls_per_turn=4,
    surplus_calls="tell",
    max_observation=None,
    observation_unit="tokens",
    observation_cut="rows",
    max_train_tokens=None,
)
NUM_TRAIN_EPISODES, NUM_VALIDATION_EPISODES = 3000, 128
SCRIPT_SAMPLING = Sampling(1, 1.0, 1.0, 0, 4096)
RECIPES = {
    "teacher": Recipe(128, 256, num_heads=4, num_kv_heads=2, slip=0.0, lr=3e-3, num_steps=1500, seed=1, batch_size=16),
    "student": Recipe(64, 128, num_heads=4, num_kv_heads=2, slip=0.85, lr=4e-3, num_steps=2000, seed=2, batch_size=24),
}


def make(role: str, out: Path) -> None:
    """Pretrain the teacher or the student on one thread and write its Hugging Face folder."""
    torch.set_num_threads(1)
    recipe = RECIPES[role]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        chat = Chat(build_tokenizer(root))
        rollouts = train_rollouts(root, chat, recipe.slip)
        model = pretrain(recipe, len(chat.tokenizer), rollouts).bfloat16()  # half the file size; loaded as float32
        model.save_pretrained(out / role)
        chat.tokenizer.save_pretrained(out / role)
        sampler = HfSampler(model.float(), stop_ids=[END_ID], pad_id=PAD_ID, batch_size=128)
        greedy = Sampling(1, 0.0, 1.0, 0, 384)
        episodes = play_episodes(root, "validation", NUM_VALIDATION_EPISODES, sampler, chat, greedy)
    fraction = sum(episode.score["fraction"] for episode in episodes) / NUM_VALIDATION_EPISODES
    score = {f"validation_greedy_fraction_{NUM_VALIDATION_EPISODES}": fraction}
    common.write_record(out / role, "tools", recipe, model, score)


def build_tokenizer(root: Path) -> PreTrainedTokenizerFast:
    """Trained on the text of 400 played episodes; a tokenizer of single bytes plays them."""
    printable = "".join(map(chr, range(32, 127)))
    chat = Chat(common.build_tokenizer([printable], PIECES, vocab_size=720))
    script = ScriptedSampler(respond, chat)
    episodes = play_episodes(root, "corpus", 400, script, chat, SCRIPT_SAMPLING)
    texts = [chat.decode(episode.rollout.token_ids, with_special=True) for episode in episodes]
    return common.build_tokenizer(texts, PIECES, vocab_size=720)


def train_rollouts(root: Path, chat: Chat, slip: float) -> list[Rollout]:
    """Scripted episodes; a share `slip` of the lookups is replaced by an invented answer."""
    script = ScriptedSampler(partial(respond, slip=slip), chat)
    episodes = play_episodes(root, "lessons", NUM_TRAIN_EPISODES, script, chat, SCRIPT_SAMPLING)
    return [episode.rollout for episode in episodes]


def play_episodes(root: Path, seed: str, count: int, sampler: Sampler, chat: Chat, sampling: Sampling) -> list[Episode]:
    """Episodes of the first `count` errands of a seed; their world is written under `root`."""
    folder = root / seed
    errands.write(folder, (errands.make(str(i), seed) for i in range(count)))
    databases = {"en": folder / "database" / "database_en"}
    environment = partial(TravelEnvironment, databases, {}, show_schemas=False)
    return play(sampler, load_tasks(folder, "en"), environment, chat, sampling, LIMITS, seed=0)


def pretrain(recipe: Recipe, vocab_size: int, rollouts: list[Rollout]) -> Qwen3ForCausalLM:
    """The learning rate decays to 5 % along a cosine."""
    rng = random.Random(recipe.seed)
    batches = iter(lambda: rng.sample(rollouts, recipe.batch_size), None)

    def decay(step: int) -> float:
        # pi * step / num_steps would round differently and change the weights.
        return 0.05 + 0.95 * common.cosine(math.pi * (step / recipe.num_steps))

    return common.pretrain(recipe, common.build_model(recipe, vocab_size), batches, decay)
