"""Packed, cut or recomputed, a backbone gives each sequence the states and gradients that it has alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.test_micro_batch import rollouts
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP

from tip_exp.models.load import make_head
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.packed_attention import BY_SEQUENCE, activation_checkpointing
from tip_exp.models.pair import Model
from tip_exp.types import Rollout

SHAPE: dict[str, Any] = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
# Qwen3's norms and rotary embedding compute in float32 whatever the weights are: not 1e-12.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def model(**changes: Any) -> Model:
    torch.manual_seed(0)
    module = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **changes)).double().eval()
    return Model(module, make_head(module, 100))


MODELS = {
    "full": model(),
    "sliding": model(use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
}


SPOKEN = Rollout([7, 8, 9], [False, True, True], "stop", [])  # other responses may be empty


def slopes(batch: MicroBatch) -> Tensor:
    """A gradient for each token that depends on nothing but its rollout and position."""
    seeds = 1.0 + 7 * batch.rollout[:, None] + 3 * batch.position[:, None] + torch.arange(16)[None]
    return torch.sin(seeds.double())


def run(one: Model, batch: MicroBatch, wanted: Tensor | None = None) -> tuple[dict[tuple[int, int], Tensor], dict]:
    """Hidden states by (rollout, position), and the parameters' gradients of their sum with `slopes`."""
    one.module.zero_grad()
    hidden = one.hidden(batch)
    keep = torch.ones(batch.num_tokens, dtype=torch.bool) if wanted is None else wanted
    (hidden * slopes(batch))[keep].sum().backward()
    states = {(int(r), int(p)): h for r, p, h in zip(batch.rollout, batch.position, hidden.detach(), strict=True)}
    return states, {name: p.grad.clone() for name, p in one.module.named_parameters() if p.grad is not None}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **CLOSE, msg=str(name))


def summed(grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in grads]).sum(0) for name in grads[0]}


@pytest.mark.parametrize("kind", sorted(MODELS))
@settings(max_examples=12)
@given(step=st.lists(rollouts(), min_size=1, max_size=5))
def test_packed_is_one_by_one(kind: str, step: list[Rollout]) -> None:
    """Values and gradients; responses with tools in their middle are among the rollouts."""
    one, step = MODELS[kind], [*step, SPOKEN]
    (packed,) = micro_batches(step, 1000, 0, packing=True)
    assert packed.input_ids.shape == (1, sum(len(r.token_ids) for r in step))
    states, grads = run(one, packed)
    alone = []
    for i, rollout in enumerate(step):
        ids = torch.tensor([rollout.token_ids])
        one.module.zero_grad()
        places = [t - 1 for t, mine in enumerate(rollout.response_mask) if mine]
        hidden = one.module.base_model(ids, use_cache=False).last_hidden_state[0, places]
        own = (packed.rollout == i).nonzero().squeeze(-1)
        (hidden * slopes(packed)[own]).sum().backward()
        alone.append({name: p.grad.clone() for name, p in one.module.named_parameters() if p.grad is not None})
        for j, state in enumerate(hidden.detach()):
            torch.testing.assert_close(states[i, j], state, **CLOSE)
    expected = summed(alone)
    same({name: grads[name] for name in expected}, expected)


def test_a_module_prepared_for_packing_still_takes_padded_rows_and_generates() -> None:
    one = model()
    step = [
        Rollout([5, 6, 7, 8, 9], [False, False, True, True, True], "stop", []),
        Rollout([4, 3], [False, True], "stop", []),
    ]
    (padded,), (packed,) = micro_batches(step, 100, 0), micro_batches(step, 100, 0, packing=True)
    before, _ = run(one, padded)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 8, 2, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    written = one.module.generate(ids, attention_mask=mask, **greedy)  # pyright: ignore[reportCallIssue]
    same(run(one, packed)[0], before)
    assert one.module.config._attn_implementation == BY_SEQUENCE
    same(run(one, padded)[0], before)
    assert written.equal(one.module.generate(ids, attention_mask=mask, **greedy))  # pyright: ignore[reportCallIssue]
    assert BY_SEQUENCE not in one.module.config.to_json_string()  # a checkpoint loads anywhere


@pytest.mark.parametrize("packing", [False, True])
def test_recomputed_gradients_are_the_same_and_layers_run_twice(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = [
        Rollout([5, 6, 7, 8, 9] * 3, [False] * 3 + [True] * 12, "stop", []),
        Rollout([4, 3], [False, True], "stop", []),
    ]
    (batch,) = micro_batches(step, 100, 0, packing=packing)
    one = model()
    plain_states, plain = run(one, batch)
    calls, forward = [], Qwen3MLP.forward

    def counted(self: Qwen3MLP, x: Tensor) -> Tensor:
        calls.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    one.module.zero_grad()
    with activation_checkpointing(one.module):
        hidden = one.hidden(batch)
    (hidden * slopes(batch)).sum().backward()
    assert calls == [False] * 4  # two layers, forward and backward; nothing inside them is in training mode
    grads = {name: p.grad for name, p in one.module.named_parameters() if p.grad is not None}
    assert all(grads[name].equal(plain[name]) for name in plain) and grads.keys() == plain.keys()
    same(plain_states, run(one, batch)[0])
    assert not any(layer.training for layer in one.module.modules() if isinstance(layer, Qwen3DecoderLayer))
    assert not copy.deepcopy(one.module).training
