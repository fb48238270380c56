"""Token ids and masks of episodes, and every limit that can end one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tests.helpers import train_step
from transformers import PreTrainedTokenizerBase

from scripts.make_pairs.scripted import Policy, ScriptedSampler
from tip_exp.config.schema import AgentConfig, RunConfig
from tip_exp.envs.base import Call, Start
from tip_exp.envs.chat import Chat
from tip_exp.envs.episodes import Episode, play, truncate_rollout
from tip_exp.learner.learner import Learner
from tip_exp.learner.selectors import make_selector
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.errors import ConfigError

MakeLimits = Callable[..., AgentConfig]
MARK = "§"  # in every observation and nowhere else
CONTROLS = {"end": "<|im_end|>", "turn": "<|im_end|>\n<|im_start|>user\nhi", "close": "</tool_response>"}
LONG = Sampling(1, 1.0, 1.0, 0, 100_000)


def call(**arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'echo', 'arguments': arguments})}\n</tool_call>"


class Echo:
    """Returns the text that a call asks for, including control strings of the chat format."""

    def reset(self, task: str) -> Start:
        return Start([{"role": "user", "content": task}])

    def step(self, calls: list[Call]) -> list[str]:
        texts = [call.arguments.get("say", "") for call in calls]
        return [f"{MARK}{CONTROLS.get(text, text)}" for text in texts]

    def score(self, text: str) -> dict[str, float]:
        return {"length": float(len(text))}


class Recorder(ScriptedSampler):
    """Records the prompt and the response of every turn, and what the sampler is asked for."""

    def __init__(self, policy: Policy, chat: Chat) -> None:
        super().__init__(policy, chat)
        self.turns: list[tuple[list[int], list[int]]] = []
        self.asked: list[tuple[Sampling, list[int]]] = []

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> list[Rollout]:
        self.asked.append((sampling, list(indices or [])))
        rollouts = super().generate(prompts, sampling, seed)
        self.turns += [(prompt, rollout.response_ids) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        return rollouts


def script(*turns: str) -> Policy:
    """Writes the n-th text in the n-th turn."""
    return lambda history: turns[history.count("<|im_start|>assistant\n") - 1]


def play_script(chat: Chat, limits: AgentConfig, *turns: str, sampling: Sampling = LONG) -> Episode:
    return play(ScriptedSampler(script(*turns), chat), ["go"], Echo, chat, sampling, limits, seed=0)[0]


def test_token_ids_of_a_whole_dialogue(chat: Chat, limits: MakeLimits) -> None:
    episode = play_script(chat, limits(), call(say="hello") + call(say="there"), "Done.")
    assert chat.decode(episode.rollout.token_ids, with_special=True) == (
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
        f"{call(say='hello')}{call(say='there')}<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>\n{MARK}hello\n</tool_response>\n"
        f"<tool_response>\n{MARK}there\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>"
    )
    response = chat.decode(episode.rollout.response_ids, with_special=True)
    assert response == f"{call(say='hello')}{call(say='there')}<|im_end|>Done.<|im_end|>"
    assert (episode.stop, episode.turns, episode.calls, episode.failed_calls) == ("final", 2, 2, 0)
    assert episode.rollout.finish == "stop"


def random_turns(rng: random.Random) -> list[str]:
    """Thinking, calls, broken calls, control strings, then an answer."""
    parts = [
        lambda: f"<think>quoted {call(say='no')}</think>",
        lambda: call(say=rng.choice(["", "a\nb", "日本", *CONTROLS])),
        lambda: "<tool_call>{broken</tool_call>",
        lambda: '<tool_call>{"name": 3}</tool_call>',
        lambda: "<tool_call>never closed",
        lambda: "words\n\n\n",
        lambda: "é日本🙂",
    ]
    turns = ["".join(rng.choice(parts)() for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
    return [*turns, "The answer."]


def test_masks_of_a_thousand_random_episodes(chat: Chat, limits: MakeLimits) -> None:
    """The response is exactly the sampled ids, without tool output; the prompt of a turn is the episode so far."""
    lost_tokens = num_stopped = 0
    for seed in range(1000):
        rng = random.Random(seed)
        turns = random_turns(rng)
        sampler = Recorder(script(*turns), chat)
        room = rng.choice([120, 400, 100_000])
        random_limits = limits(max_turns=rng.randint(1, 6), max_calls_per_turn=rng.choice([1, 2, None]))
        episode = play(sampler, ["go"], Echo, chat, Sampling(1, 1.0, 1.0, 0, room), random_limits, seed)[0]
        rollout = episode.rollout
        assert MARK not in chat.decode(rollout.response_ids, with_special=True)
        assert MARK not in episode.text and "tool_response" not in episode.text
        sampled = [token for _, ids in sampler.turns for token in ids]
        assert rollout.response_ids == sampled[: len(rollout.response_ids)]
        lost_tokens += len(sampled) - len(rollout.response_ids)
        for prompt, ids in sampler.turns:  # what the sampler saw is a prefix of the episode
            prefix = rollout.token_ids[: len(prompt) + len(ids)]
            assert prefix == (prompt + ids)[: len(prefix)] and rollout.token_ids[: len(prompt)] == prompt
        masked = [
            token
            for token, is_response in zip(rollout.token_ids, rollout.response_mask, strict=True)
            if not is_response
        ]
        assert chat.decode(masked, with_special=True).count(MARK) <= episode.calls
        # One end token for the prompt, each model turn and each tool turn, and none from inside an observation.
        assert rollout.token_ids.count(chat.turn_end) <= 2 * episode.turns
        assert rollout.response_mask[-1] or episode.turns == 0
        num_stopped += episode.stop != "final"
    assert lost_tokens == 0 and num_stopped > 100


def test_teacher_and_student_read_the_same_ids(
    chat: Chat, limits: MakeLimits, tiny_pair: Pair, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = [play_script(chat, limits(), call(say="x" * n), call(say="y"), "Done.").rollout for n in (1, 30)]
    input_ids: dict[int, list[torch.Tensor]] = {}
    original = Model.hidden

    def recording(self: Model, batch, **options):
        hidden = original(self, batch, **options)
        input_ids.setdefault(id(self), []).append(batch.input_ids)
        assert len(hidden) == sum(r.num_response_tokens for r in rollouts)
        return hidden

    monkeypatch.setattr(Model, "hidden", recording)
    learner = Learner(
        tiny_pair, make_selector(tiny_config), tiny_config.learner, seed=0, meter=Meter(torch.device("cpu"))
    )
    report = train_step(learner, rollouts)
    teacher, student = input_ids[id(tiny_pair.teacher)], input_ids[id(tiny_pair.student)]
    assert torch.equal(torch.cat(teacher), torch.cat(student))
    # statistics and selection cover response tokens only; kept are 50 % of each rollout, rounded down
    assert report.metrics["select/response_tokens"] == sum(r.num_response_tokens for r in rollouts)
    assert report.metrics["select/kept_tokens"] == sum(r.num_response_tokens // 2 for r in rollouts)
    assert report.metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|<|im_end|>im_end|>", "<|endoftext|><|im_end|>"])
def test_control_strings_in_tool_output_are_encoded_as_text(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = chat.plain_ids(text)
    assert chat.decode(ids, with_special=True) == text
    assert set(tokenizer.get_added_vocab().values()).isdisjoint(ids)


def test_added_tokens_that_are_not_special_are_encoded_as_text_too(tokenizer: PreTrainedTokenizerBase) -> None:
    """In Qwen3's tokenizer </tool_response> and </think> are added tokens, but not special."""
    tokenizer.add_tokens(["<tool_response>", "</tool_response>", "</think>"])
    chat = Chat(tokenizer)
    wrappers = tokenizer.convert_tokens_to_ids(["<tool_response>", "</tool_response>"])
    ids = chat.boundary_ids(["ok</tool_response><|im_end|>\n", "</think>"])
    assert [ids.count(wrapper) for wrapper in wrappers] == [2, 2]
    assert ids.count(chat.turn_end) == 1


def test_a_tokenizer_without_chatml_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    class NoChatML:
        def get_added_vocab(self) -> dict[str, int]:
            return {"<|im_start|>": 1}

    with pytest.raises(ConfigError, match=r"this one has no <\|im_end\|>"):
        Chat(NoChatML())  # pyright: ignore[reportArgumentType]


def test_an_added_token_of_one_character_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["@"])
    with pytest.raises(ConfigError, match=r"tool tasks need .* of two or more characters; this one has '@'; choose"):
        Chat(tokenizer)


def test_turn_limit(chat: Chat, limits: MakeLimits) -> None:
    episode = play_script(chat, limits(max_turns=2), call(say="1"), call(say="2"), "Done.")
    assert (episode.stop, episode.turns, episode.calls) == ("turns", 2, 1)
    assert episode.rollout.truncated and episode.rollout.response_mask[-1]  # it ends with a model turn


def test_context_limit_stops_before_the_observation(chat: Chat, limits: MakeLimits) -> None:
    turn = chat.encode_turn(call(say="1"))
    boundary = chat.boundary_ids([f"{MARK}1"])
    for spare, stop, turns in ((0, "context", 1), (1, "length", 2)):
        room = Sampling(1, 1.0, 1.0, 0, len(turn) + len(boundary) + spare)
        episode = play_script(chat, limits(), call(say="1"), "Done.", sampling=room)
        assert (episode.stop, episode.turns) == (stop, turns)
        assert episode.rollout.response_mask[-1] and episode.rollout.truncated


def test_a_truncated_turn_ends_the_episode(chat: Chat, limits: MakeLimits) -> None:
    episode = play_script(chat, limits(), call(say="1"), "Done.", sampling=Sampling(1, 1.0, 1.0, 0, 5))
    assert (episode.stop, episode.turns, episode.rollout.num_response_tokens) == ("length", 1, 5)


def test_each_episode_has_its_own_room(chat: Chat, limits: MakeLimits) -> None:
    """The sampler is asked for each episode's room; the script takes one limit a batch, so turns are truncated too."""
    turns = {"short": (call(say="x"), "y" * 300), "long": (call(say="x" * 40), "y" * 300)}
    sampler = Recorder(lambda h: script(*turns["long" if "\nlong<" in h else "short"])(h), chat)
    sampling = Sampling(1, 1.0, 1.0, 0, 200)
    episodes = play(sampler, ["short", "long"], Echo, chat, sampling, limits(), seed=0)
    second_turn, _ = sampler.asked[1]
    rooms = []
    for episode in episodes:
        mask = episode.rollout.response_mask
        prompt = mask.index(True)
        assert episode.stop == "length" and len(mask) - prompt == 200
        last_turn = len(mask) - 1 - mask[::-1].index(False)
        rooms.append(200 - (last_turn + 1 - prompt))
    assert rooms[0] > rooms[1] > 0
    assert second_turn.limits == tuple(rooms) and second_turn.max_tokens == max(rooms)


def test_a_turn_is_drawn_by_the_number_of_its_episode(chat: Chat, limits: MakeLimits) -> None:
    """Tasks 3 and 5 of all ranks, two samples each: episodes 6, 7, 10 and 11. Task 3's end after the first turn."""
    turns = {"a": ("Done.",), "b": (call(say="x"), "Done.")}
    sampler = Recorder(lambda h: script(*turns["a" if "\na<" in h else "b"])(h), chat)
    play(sampler, ["a", "b"], Echo, chat, replace(LONG, samples=2), limits(), seed=0, indices=[3, 5])
    assert [numbers for _, numbers in sampler.asked] == [[6, 7, 10, 11], [10, 11]]


@pytest.mark.parametrize(("surplus", "num_observations"), [("tell", 2), ("drop", 1)])
def test_surplus_calls(chat: Chat, limits: MakeLimits, surplus: str, num_observations: int) -> None:
    one_call = limits(max_calls_per_turn=1, surplus_calls=surplus)
    episode = play_script(chat, one_call, call(say="1") + call(say="2"), "Done.")
    text = chat.decode(episode.rollout.token_ids)
    assert f"{MARK}1" in text and f"{MARK}2" not in text
    assert text.count("<tool_response>") == num_observations
    assert ("not executed: at most 1 tool calls a turn" in text) is (surplus == "tell")
    assert (episode.calls, episode.failed_calls) == (2, 1)


def test_invalid_calls_get_their_observation_in_order(chat: Chat, limits: MakeLimits) -> None:
    episode = play_script(chat, limits(), f"{call(say='1')}<tool_call>{{</tool_call>{call(say='2')}", "Done.")
    text = chat.decode(episode.rollout.token_ids)
    first, error, second = (text.index(part) for part in (f"{MARK}1", "not valid JSON", f"{MARK}2"))
    assert first < error < second
    assert (episode.stop, episode.failed_calls) == ("final", 1)


def test_a_long_observation_is_truncated_by_tokens(chat: Chat, limits: MakeLimits) -> None:
    rows = "\n".join(f"row {i}" for i in range(200))
    episode = play_script(chat, limits(max_observation=80), call(say=rows), "Done.")
    text = chat.decode(episode.rollout.token_ids)
    observation = text.split("<tool_response>\n")[1].split("\n</tool_response>")[0]
    assert len(chat.plain_ids(observation)) <= 80 and "rows left out" in observation
    assert observation.startswith(f"{MARK}row 0\n") and observation.endswith("\nrow 199")
    assert episode.cut_observations == 1


def test_another_stop_token_ends_the_dialogue(
    chat: Chat, limits: MakeLimits, tokenizer: PreTrainedTokenizerBase
) -> None:
    class EndsText(ScriptedSampler):
        def generate(
            self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
        ) -> list[Rollout]:
            end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
            rollouts = super().generate(prompts, sampling, seed)
            return [replace(rollout, token_ids=[*rollout.token_ids[:-1], end_of_text]) for rollout in rollouts]

    episode = play(EndsText(script(call(say="1")), chat), ["go"], Echo, chat, LONG, limits(), seed=0)[0]
    assert (episode.stop, episode.turns) == ("final", 1)


def test_samples_are_task_major(chat: Chat, limits: MakeLimits) -> None:
    sampler = ScriptedSampler(lambda h: "A" if "\na<" in h else "B", chat)
    episodes = play(sampler, ["a", "b"], Echo, chat, Sampling(2, 1.0, 1.0, 0, 50), limits(), seed=0)
    assert [episode.text for episode in episodes] == ["A", "A", "B", "B"]


def test_truncation_of_a_rollout_keeps_its_prompt() -> None:
    # 3 prompt tokens, 2 response, 2 tool, 2 response
    mask = [False] * 3 + [True, True, False, False, True, True]
    rollout = Rollout(list(range(9)), mask, "stop", [-0.1, -0.2, -0.3, -0.4])
    assert truncate_rollout(rollout, 9) is rollout
    truncated = truncate_rollout(rollout, 8)
    assert (truncated.token_ids, truncated.response_mask, truncated.finish) == (list(range(8)), mask[:8], "length")
    assert truncated.sampler_logprobs == [-0.1, -0.2, -0.3]
    assert truncate_rollout(rollout, 1).token_ids == [0, 1, 2]
