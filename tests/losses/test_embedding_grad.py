"""Gradients added in place are autograd's own, and of a head-sized tensor there is one copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tip_exp.losses.divergence import Divergence
from tip_exp.losses.embedding_grad import embedded, is_plain
from tip_exp.losses.fused import fused
from tip_exp.models.load import make_head
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import Model
from tip_exp.records.meter import Meter
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedded_is_the_embedding_forward_and_backward(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    ours = nn.Embedding(6, 4, padding_idx=padding_idx)
    theirs = copy.deepcopy(ours)
    ids = torch.tensor([[1, 2, 2, 5], [1, 1, 0, 2]])
    slope = torch.randn(2, 4, 4)
    for _ in range(2):  # gradients add up
        out = embedded(ours, ids)
        (out * slope).sum().backward()
        (theirs(ids) * slope).sum().backward()
        assert out.equal(theirs(ids)) and out.grad is None
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_frequent_token_is_summed_before_it_is_rounded() -> None:
    """4096 gradients of 1 on top of 256: bfloat16 has 8 bits, so added one by one they would all be lost."""
    embedding = nn.Embedding(2, 1, dtype=torch.bfloat16)
    embedding.weight.grad = torch.tensor([[0.0], [256.0]], dtype=torch.bfloat16)
    embedded(embedding, torch.ones(1, 4096, dtype=torch.long)).sum().backward()
    assert embedding.weight.grad.flatten().tolist() == [0.0, 4352.0]


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    embedding = nn.Embedding(3, 2)
    with torch.no_grad():
        assert not embedded(embedding, torch.tensor([1])).requires_grad
    embedding.weight.requires_grad_(False)
    assert not embedded(embedding, torch.tensor([1])).requires_grad


def test_what_is_no_plain_look_up_is_left_to_autograd() -> None:
    class Scaled(nn.Embedding):
        pass

    hooked = nn.Embedding(3, 2)
    hooked.register_forward_hook(lambda *_: None)
    others = [Scaled(3, 2), nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, sparse=True), hooked]
    assert is_plain(nn.Embedding(3, 2)) and not any(is_plain(one) for one in others)


def tied(vocab: int, hidden: int) -> Model:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=16, tie_word_embeddings=True, pad_token_id=0, **shape
    )
    module = Qwen3ForCausalLM(config).eval()
    return Model(module, make_head(module, vocab))


def test_a_tied_pairs_update_allocates_one_head_and_two_tiles() -> None:
    """Head: 65,536 x 64 float32 = 16 MiB; tiles 2 MiB; blocks and the backbone's own few. A second copy would show."""
    model = tied(65_536, 64)
    (batch,) = micro_batches([Rollout([5, 6, 7, 8] * 4, [False] * 8 + [True] * 8, "stop", [])], 64, pad_id=0)
    meter = Meter(torch.device("cpu"))
    meter.count_allocations = True
    with meter.span("update", allocations=True):
        hidden = model.hidden(batch)
        kept = torch.ones(batch.num_tokens, dtype=torch.bool)
        other = torch.randn_like(hidden)
        one = Divergence("reverse_kl")
        result = fused(hidden.detach(), other, kept, model.head, model.head, one, 2 * MIB)
        hidden.backward(result.hidden_grad)
    assert model.head.weight.grad is not None
    assert 16 <= meter.memory()["memory/update_extra_mib"] < 16 + 2 + 6


def test_a_tied_models_gradient_is_autograds() -> None:
    model = tied(50, 16)
    rollouts = [
        Rollout([3, 4, 3, 9, 4], [False, False, True, True, True], "stop", []),
        Rollout([7, 8], [False, True], "stop", []),
    ]
    (batch,) = micro_batches(rollouts, 64, pad_id=0)
    model.hidden(batch).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    out = model.module.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    out[batch.rows, batch.columns].square().sum().backward()
    for name, p in model.module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
