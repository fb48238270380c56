"""Packing and checkpointing change neither hidden states nor gradients of a sequence."""

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

from tip_exp.losses.embedding_grad import is_plain_embedding
from tip_exp.models.load import make_head
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.packed_attention import BY_SEQUENCE, activation_checkpointing
from tip_exp.models.pair import Model
from tip_exp.types import Rollout

SHAPE: dict[str, Any] = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
# Qwen3's norms and rotary embedding compute in float32 whatever the weights are: not 1e-12.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def make_model(**changes: Any) -> Model:
    torch.manual_seed(0)
    module = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **changes)).double().eval()
    return Model(module, make_head(module, 100))


MODELS = {
    "full": make_model(),
    "sliding": make_model(
        use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
}


NON_EMPTY = Rollout([7, 8, 9], [False, True, True], "stop", [])  # drawn responses may be empty


def hidden_grads(batch: MicroBatch) -> Tensor:
    """(N, 16): a gradient per token that depends on its rollout and position only."""
    seeds = 1.0 + 7 * batch.rollout[:, None] + 3 * batch.position[:, None] + torch.arange(16)[None]
    return torch.sin(seeds.double())


def run(model: Model, batch: MicroBatch) -> tuple[dict[tuple[int, int], Tensor], dict]:
    """Hidden states by (rollout, position), and parameter gradients for `hidden_grads`."""
    model.module.zero_grad()
    hidden = model.hidden(batch)
    (hidden * hidden_grads(batch)).sum().backward()
    states = {(int(r), int(p)): h for r, p, h in zip(batch.rollout, batch.position, hidden.detach(), strict=True)}
    return states, gradients_of(model)


def gradients_of(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def assert_close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **CLOSE, msg=str(name))


def summed(grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([of_sequence[name] for of_sequence in grads]).sum(0) for name in grads[0]}


@pytest.mark.parametrize("kind", sorted(MODELS))
@settings(max_examples=12)
@given(step=st.lists(rollouts(), min_size=1, max_size=5))
def test_packed_sequences_are_computed_as_if_alone(kind: str, step: list[Rollout]) -> None:
    """Values and gradients, also for responses with tool output in the middle."""
    model, step = MODELS[kind], [*step, NON_EMPTY]
    (packed,) = micro_batches(step, 1000, 0, packing=True)
    assert packed.input_ids.shape == (1, sum(len(r.token_ids) for r in step))
    states, grads = run(model, packed)
    alone = []
    for i, rollout in enumerate(step):
        ids = torch.tensor([rollout.token_ids])
        model.module.zero_grad()
        columns = [t - 1 for t, written in enumerate(rollout.response_mask) if written]
        hidden = model.module.base_model(ids, use_cache=False).last_hidden_state[0, columns]
        tokens = (packed.rollout == i).nonzero().squeeze(-1)
        (hidden * hidden_grads(packed)[tokens]).sum().backward()
        alone.append(gradients_of(model))
        for j, state in enumerate(hidden.detach()):
            torch.testing.assert_close(states[i, j], state, **CLOSE)
    expected = summed(alone)
    assert_close({name: grads[name] for name in expected}, expected)


def test_a_module_switched_to_packing_still_takes_padded_rows_and_generates() -> None:
    model = make_model()
    step = [
        Rollout([5, 6, 7, 8, 9], [False, False, True, True, True], "stop", []),
        Rollout([4, 3], [False, True], "stop", []),
    ]
    (padded,), (packed,) = micro_batches(step, 100, 0), micro_batches(step, 100, 0, packing=True)
    before, _ = run(model, padded)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 8, 2, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    generated = model.module.generate(ids, attention_mask=mask, **greedy)  # pyright: ignore[reportCallIssue]
    assert_close(run(model, packed)[0], before)
    assert model.module.config._attn_implementation == BY_SEQUENCE
    assert_close(run(model, padded)[0], before)
    assert generated.equal(model.module.generate(ids, attention_mask=mask, **greedy))  # pyright: ignore[reportCallIssue]
    assert BY_SEQUENCE not in model.module.config.to_json_string()  # a checkpoint loads anywhere


@pytest.mark.parametrize("packing", [False, True])
def test_checkpointed_gradients_are_equal_and_layers_run_twice(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = [
        Rollout([5, 6, 7, 8, 9] * 3, [False] * 3 + [True] * 12, "stop", []),
        Rollout([4, 3], [False, True], "stop", []),
    ]
    (batch,) = micro_batches(step, 100, 0, packing=packing)
    model = make_model()
    plain_states, plain_grads = run(model, batch)
    calls, forward = [], Qwen3MLP.forward

    def counted(self: Qwen3MLP, x: Tensor) -> Tensor:
        calls.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    model.module.zero_grad()
    with activation_checkpointing(model.module):
        hidden = model.hidden(batch)
    (hidden * hidden_grads(batch)).sum().backward()
    assert calls == [False] * 4  # two layers, forward and backward; nothing inside them is in training mode
    grads = gradients_of(model)
    assert all(grads[name].equal(plain_grads[name]) for name in plain_grads) and grads.keys() == plain_grads.keys()
    assert_close(plain_states, run(model, batch)[0])
    assert not any(layer.training for layer in model.module.modules() if isinstance(layer, Qwen3DecoderLayer))
    assert not copy.deepcopy(model.module).training
    assert is_plain_embedding(model.module.get_input_embeddings())  # no hook of transformers is left on it
