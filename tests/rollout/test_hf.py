"""Sampling with transformers: ids, masks, log-probs and finish reasons are right, and a seed reproduces them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tqdm import tqdm
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from tip_exp.models.pair import Pair
from tip_exp.rollout import hf
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Rollout, Sampling

QUESTIONS = [
    "Tom has 7 pens. He finds 2. He finds 4. How many pens?",
    "Amy has 9 eggs. He gives 3. He gives 2. How many eggs?",
]


def sampler(pair: Pair, batch_size: int = 8) -> HfSampler:
    return HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=batch_size)


def test_samples_are_prompt_major_and_keep_their_prompts(tiny_pair: Pair) -> None:
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    rollouts = sampler(tiny_pair).generate(prompts, Sampling(3, 1.0, 1.0, 0, 72), seed=0)
    assert len(rollouts) == 6
    for i, rollout in enumerate(rollouts):
        prompt = prompts[i // 3]
        assert rollout.token_ids[: len(prompt)] == prompt and not any(rollout.response_mask[: len(prompt)])
        assert all(rollout.response_mask[len(prompt) :])
        assert rollout.finish == "stop" and rollout.response_ids[-1] == 2 and 2 not in rollout.response_ids[:-1]


def test_a_seed_gives_the_same_rollouts_again(tiny_pair: Pair) -> None:
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    first, again, other_seed = (
        sampler(tiny_pair).generate(prompts, Sampling(2, 1.0, 1.0, 0, 72), seed=s) for s in (1, 1, 2)
    )
    assert first == again
    assert [r.token_ids for r in first] != [r.token_ids for r in other_seed]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_forward_pass_keeps_nothing_for_a_gradient(tiny_pair: Pair, sharded: bool) -> None:
    """Whole weights are sampled from in inference mode, sharded ones without it, as FSDP reuses its buffers."""
    modes: list[tuple[bool, bool]] = []
    module = tiny_pair.student.module
    hook = module.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    options: dict[str, Any] = {"stop_ids": tiny_pair.stop_ids, "pad_id": tiny_pair.pad_id, "batch_size": 8}
    with hook:
        HfSampler(module, **options, sharded=sharded).generate([[3, 4]], Sampling(1, 1.0, 1.0, 0, 3), seed=0)
    assert set(modes) == {(not sharded, False)}


def test_logprobs_equal_those_of_a_forward_pass(tiny_pair: Pair) -> None:
    """At temperature 1 for any sampling temperature, up to float32 rounding of a pass without cache or padding."""
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    for temperature in (1.0, 0.7):
        for rollout in sampler(tiny_pair).generate(prompts, Sampling(2, temperature, 1.0, 0, 72), seed=0):
            with torch.no_grad():
                logprobs = tiny_pair.student.module(torch.tensor([rollout.token_ids])).logits[0].log_softmax(-1)
            start = len(rollout.token_ids) - rollout.num_response_tokens
            expected = [float(logprobs[t - 1, rollout.token_ids[t]]) for t in range(start, len(rollout.token_ids))]
            assert rollout.sampler_logprobs == pytest.approx(expected, abs=2e-4)


def test_a_bar_counts_the_responses_as_they_end(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            self.counts: list[float] = []
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            assert n is not None and n >= 0
            self.counts.append(n)
            return super().update(n)

    monkeypatch.setattr(hf, "progress_bar", Bar)
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    sampler(tiny_pair, batch_size=5).generate(prompts, Sampling(4, 1.0, 1.0, 0, 72), seed=0)
    (bar,) = bars
    assert (bar.total, bar.n) == (8, 8)
    assert len([count for count in bar.counts if count > 0]) > 2, "not only when a batch ends"


def test_truncated_responses_are_marked(tiny_pair: Pair) -> None:
    prompts = [tiny_pair.prompt_ids(QUESTIONS[0])]
    (rollout,) = sampler(tiny_pair).generate(prompts, Sampling(1, 1.0, 1.0, 0, 5), seed=0)
    assert rollout.truncated and rollout.finish == "length" and rollout.num_response_tokens == 5


def test_the_models_generation_config_is_not_used(tiny_pair: Pair) -> None:
    """Near-greedy defaults in it do not make temperature-1 samples near-greedy, and are left unchanged."""
    greedy_looking = GenerationConfig(temperature=0.01, top_k=1, do_sample=True, eos_token_id=2)
    tiny_pair.student.module.generation_config = greedy_looking
    prompts = [tiny_pair.prompt_ids(QUESTIONS[0])]
    texts = {tuple(r.response_ids) for r in sampler(tiny_pair).generate(prompts, Sampling(8, 1.0, 1.0, 0, 72), seed=0)}
    assert len(texts) > 1
    assert tiny_pair.student.module.generation_config is greedy_looking


def test_greedy_is_deterministic_and_batching_does_not_change_it(tiny_pair: Pair) -> None:
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    greedy = Sampling(1, 0.0, 1.0, 0, 72)
    together = sampler(tiny_pair).generate(prompts, greedy, seed=0)
    apart = sampler(tiny_pair, batch_size=1).generate(prompts, greedy, seed=1)
    assert [r.token_ids for r in together] == [r.token_ids for r in apart]


def test_greedy_is_what_transformers_generates(tiny_pair: Pair) -> None:
    for question in QUESTIONS:
        ids = tiny_pair.prompt_ids(question)
        (rollout,) = sampler(tiny_pair).generate([ids], Sampling(1, 0.0, 1.0, 0, 72), seed=0)
        settings = GenerationConfig(max_new_tokens=72, do_sample=False, eos_token_id=tiny_pair.stop_ids, pad_token_id=0)
        expected = tiny_pair.student.module.generate(torch.tensor([ids]), generation_config=settings)
        assert rollout.token_ids == expected[0].tolist()


def test_removing_finished_responses_changes_no_other(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    sampling = Sampling(8, 1.0, 1.0, 0, 72)
    removing = sampler(tiny_pair, batch_size=16).generate(prompts, sampling, seed=0)
    assert len({rollout.num_response_tokens for rollout in removing}) > 3, "responses finish at different steps"
    monkeypatch.setattr(hf, "MIN_FINISHED_SHARE", 2.0)
    keeping = sampler(tiny_pair, batch_size=16).generate(prompts, sampling, seed=0)
    assert [r.token_ids for r in removing] == [r.token_ids for r in keeping]
    for removed, kept in zip(removing, keeping, strict=True):
        assert removed.sampler_logprobs == pytest.approx(kept.sampler_logprobs, abs=1e-5)


SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
HYBRIDS = {
    "attention and recurrence in one layer": lambda: FalconH1ForCausalLM(FalconH1Config(**SIZES, **MAMBA)),
    "layers of either": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES, **LINEAR)),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrent_states_of_finished_responses_leave_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = HYBRIDS[name]().eval()
    rollouts = []
    for share in (0.0, 2.0):  # every response as it ends, and none
        monkeypatch.setattr(hf, "MIN_FINISHED_SHARE", share)
        sampler = HfSampler(model, stop_ids=list(range(12)), pad_id=0, batch_size=8)
        rollouts.append(sampler.generate([[20, 21, 22], [30, 31]], Sampling(4, 1.0, 1.0, 0, 12), seed=0))
    lengths = {rollout.num_response_tokens for rollout in rollouts[0]}
    assert len(lengths) > 2, "responses end at several lengths"
    for removed, kept in zip(*rollouts, strict=True):
        assert removed.token_ids == kept.token_ids
        assert removed.sampler_logprobs == pytest.approx(kept.sampler_logprobs, abs=1e-5)


def test_a_batch_draws_from_torchs_generator_and_leaves_the_global_one() -> None:
    """One row of numbers a token for a whole batch; other batches and other shares draw other rows of the same."""
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    expected = [torch.rand(6, dtype=torch.float64) for _ in range(3)]
    before = torch.get_rng_state()
    whole = hf.Draws(5, list(range(6)), 6, 8, cpu)
    assert all(whole.next().equal(numbers) for numbers in expected)
    some = hf.Draws(5, [4, 1], 6, 8, cpu)
    assert all(some.next().equal(numbers[[4, 1]]) for numbers in expected)
    third, both = hf.Draws(5, [8, 9], 10, 4, cpu), hf.Draws(5, [3, 9], 10, 4, cpu)
    numbers, first_and_third = third.next(), both.next()
    assert first_and_third[1] == numbers[1] and not bool((numbers[:, None] == expected[0]).any())
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "expected"),
    [
        (1.0, 1.0, 0, [0.0, 0.5, 0.3, 0.15, 0.05, 0.0]),
        (0.5, 1.0, 0, [0.0, 0.25, 0.09, 0.0225, 0.0025, 0.0]),
        (1.0, 0.75, 0, [0.0, 0.5, 0.3, 0.0, 0.0, 0.0]),
        (1.0, 1.0, 3, [0.0, 0.5, 0.3, 0.15, 0.0, 0.0]),
    ],
)
def test_tokens_follow_the_distribution(temperature: float, top_p: float, top_k: int, expected: list[float]) -> None:
    count = 20_000
    logits = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05, 0.0]).log().expand(count, -1)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    warpers = hf._warpers(Sampling(1, temperature, top_p, top_k, 1))
    counts = hf._draw(warpers(torch.zeros(count, 1, dtype=torch.long), logits), uniform).bincount(minlength=6)
    possible = torch.tensor(expected) > 0
    assert int(counts[~possible].sum()) == 0
    weights = torch.tensor(expected, dtype=torch.float64)[possible]
    assert chisquare(counts[possible].double(), weights / weights.sum() * count).pvalue > 1e-3


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_extremes_of_the_uniform_give_possible_tokens(uniform: float, token: int) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.1, -torch.inf]])
    assert int(hf._draw(logits, torch.tensor([uniform], dtype=torch.float64))) == token


def test_inconsistent_rollouts_are_refused() -> None:
    with pytest.raises(AssertionError, match="one mask entry per token"):
        Rollout([1, 2], [False], "stop", [])
    with pytest.raises(AssertionError, match="starts with its prompt"):
        Rollout([1], [True], "stop", [])
    with pytest.raises(AssertionError, match="one log-prob per response token"):
        Rollout([1, 2], [False, True], "stop", [0.1, 0.2])
