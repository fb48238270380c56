"""Packed, checkpointed and cut: the same hidden states and gradients as every sequence alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tip_exp.backbone import PACKED_SDPA, enable_packing, last_hidden
from tip_exp.batching import micro_batches, without_tails
from tip_exp.config import ConfigError
from tip_exp.rollout.hf import HfSampler
from tip_exp.rollout.types import Rollout, Sampling

VOCAB = 40


def network(attention: str = "sdpa", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        attn_implementation=attention,
        **changes,
    )
    return Qwen3ForCausalLM(config).double().eval()


def rollout(length: int, seed: int, prompt: int = 1) -> Rollout:
    ids = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Rollout(ids, [False] * prompt + [True] * (length - prompt), "stop", [])


def alone(module: PreTrainedModel, rollouts: list[Rollout]) -> dict[tuple[int, int], Tensor]:
    """(rollout, place in its response) -> the hidden state that predicts it, each rollout by itself."""
    found = {}
    for i, one in enumerate(rollouts):
        hidden = module.model(torch.tensor([one.token_ids])).last_hidden_state[0]
        places = [at - 1 for at, written in enumerate(one.response_mask) if written]
        found |= {(i, n): hidden[at] for n, at in enumerate(places)}
    return found


def weight(key: tuple[int, int]) -> float:
    return 1 + 0.3 * key[0] - 0.1 * key[1]


def gradients(module: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 10
    for name, gradient in expected.items():
        # the norms of Qwen3 compute in float32 whatever the weights are
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1e-3))


@settings(max_examples=15)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.integers(12, 40), st.booleans(), st.booleans())
def test_hidden_states_and_gradients_equal_those_of_each_sequence_alone(
    lengths: list[int], budget: int, packing: bool, checkpointing: bool
) -> None:
    module = network()
    rollouts = [rollout(length, seed) for seed, length in enumerate(lengths)]
    expected = alone(module, rollouts)
    sum(value.pow(3).sum() * weight(key) for key, value in expected.items()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    naive = gradients(module)
    if packing:
        enable_packing(module)
    seen: set[tuple[int, int]] = set()
    for batch in micro_batches(rollouts, budget, pad_id=0, packing=packing):
        assert batch.is_packed == packing and batch.input_ids.numel() <= budget
        hidden = last_hidden(module, batch, checkpointing=checkpointing)[batch.rows, batch.columns]
        keys = list(zip(batch.rollout.tolist(), batch.position.tolist(), strict=True))
        for key, value in zip(keys, hidden, strict=True):
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
        (hidden.pow(3).sum(-1) * torch.tensor([weight(key) for key in keys])).sum().backward()
        seen |= set(keys)
    assert seen == set(expected)
    assert_same_gradients(gradients(module), naive)


@settings(max_examples=25)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=5),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
)
def test_cutting_tails_is_exact(lengths: list[int], seed: int, share: float, packing: bool) -> None:
    """Kept hidden states and every gradient are those of the whole sequences; what is left behind was not needed."""
    module = network()
    if packing:
        enable_packing(module)
    rollouts = [rollout(length, i) for i, length in enumerate(lengths)]
    (batch,) = micro_batches(rollouts, 1000, pad_id=0, packing=packing)
    kept = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(seed)) < share
    shorter = without_tails(batch, rollouts, kept, pad_id=0)
    if not kept.any():
        assert shorter is None
        return
    assert shorter is not None
    smaller, left = shorter
    assert bool(left[kept].all()) and int(left.sum()) == smaller.num_tokens
    assert smaller.token_ids.equal(batch.token_ids[left]) and smaller.position.equal(batch.position[left])
    assert smaller.rollout.equal(batch.rollout[left])
    lasts = {i: int(batch.position[kept & (batch.rollout == i)].max()) for i in batch.rollout[kept].unique().tolist()}
    assert sorted(smaller.lengths) == sorted(1 + last + 1 for last in lasts.values())  # one of a prompt, then tokens
    whole = last_hidden(module, batch)[batch.rows, batch.columns]
    whole[kept].pow(3).sum().backward()
    expected = gradients(module)
    cut = last_hidden(module, smaller)[smaller.rows, smaller.columns][kept[left]]
    torch.testing.assert_close(cut, whole[kept], rtol=1e-5, atol=1e-5)
    cut.pow(3).sum().backward()
    assert_same_gradients(gradients(module), expected)


def test_packing_has_no_padding() -> None:
    lengths = [3, 9, 4, 2]
    rollouts = [rollout(length, i) for i, length in enumerate(lengths)]
    padded, packed = (micro_batches(rollouts, 1000, pad_id=0, packing=packing)[0] for packing in (False, True))
    assert padded.input_ids.shape == (4, 9) and packed.input_ids.shape == (1, 18)
    assert packed.positions[0].tolist() == [*range(3), *range(9), *range(4), *range(2)]


def test_a_model_that_packs_samples_as_before() -> None:
    module, other = network(), network()
    enable_packing(module)
    assert module.config._attn_implementation == PACKED_SDPA
    prompts, sampling = [[5, 6, 7], [8, 9, 10, 11, 12]], Sampling(2, 1.0, 1.0, 0, 12)
    written = [
        HfSampler(one, stop_ids=[0], pad_id=0, batch_size=8).generate(prompts, sampling, seed=1)
        for one in (module, other)
    ]
    assert [r.token_ids for r in written[0]] == [r.token_ids for r in written[1]]


def test_what_packing_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="eager would need a mask"):
        enable_packing(network("eager"))
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(ConfigError, match="sliding window"):
        enable_packing(network(**window))


def test_checkpointing_keeps_less_and_leaves_the_model_as_it_was() -> None:
    module = network()
    (batch,) = micro_batches([rollout(12, i) for i in range(4)], 1000, pad_id=0)
    kept = {}
    for checkpointing in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            last_hidden(module, batch, checkpointing=checkpointing)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]
    assert not any(layer.training for layer in module.modules())
    fresh = copy.deepcopy(module)
    torch.testing.assert_close(last_hidden(module, batch, checkpointing=True), last_hidden(fresh, batch))
