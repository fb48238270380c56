"""Gradients added in place equal autograd's, and a head-sized parameter has one gradient buffer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tip_exp.losses import fused
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.embedding_grad import embed, is_plain_embedding
from tip_exp.losses.head import LazyLogits
from tip_exp.models.load import make_head
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import Model
from tip_exp.records.meter import Meter
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embed_equals_the_embedding_forward_and_backward(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4, padding_idx=padding_idx)
    by_autograd = copy.deepcopy(embedding)
    ids = torch.tensor([[1, 2, 2, 5], [1, 1, 0, 2]])
    output_grad = torch.randn(2, 4, 4)
    for _ in range(2):  # gradients accumulate
        output = embed(embedding, ids)
        (output * output_grad).sum().backward()
        (by_autograd(ids) * output_grad).sum().backward()
        assert output.equal(by_autograd(ids)) and output.grad is None
    assert embedding.weight.grad is not None and by_autograd.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad, by_autograd.weight.grad)


def test_gradients_of_a_frequent_token_are_summed_before_rounding() -> None:
    """4096 gradients of 1 on top of 256: bfloat16 has 8 bits, so adding them one by one would leave 256."""
    embedding = nn.Embedding(2, 1, dtype=torch.bfloat16)
    embedding.weight.grad = torch.tensor([[0.0], [256.0]], dtype=torch.bfloat16)
    embed(embedding, torch.ones(1, 4096, dtype=torch.long)).sum().backward()
    assert embedding.weight.grad.flatten().tolist() == [0.0, 4352.0]


def test_no_gradient_is_recorded_without_grad_mode_or_for_frozen_weights() -> None:
    embedding = nn.Embedding(3, 2)
    with torch.no_grad():
        assert not embed(embedding, torch.tensor([1])).requires_grad
    embedding.weight.requires_grad_(False)
    assert not embed(embedding, torch.tensor([1])).requires_grad


def test_only_plain_lookups_are_replaced() -> None:
    class Subclass(nn.Embedding):
        pass

    hooked = nn.Embedding(3, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert is_plain_embedding(nn.Embedding(3, 2))
    for embedding in (Subclass(3, 2), nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, sparse=True), hooked):
        assert not is_plain_embedding(embedding)


def tied(vocab: int, hidden: int) -> Model:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=16, tie_word_embeddings=True, pad_token_id=0, **shape
    )
    module = Qwen3ForCausalLM(config).eval()
    return Model(module, make_head(module, vocab))


def test_an_update_of_a_tied_model_allocates_one_head_and_two_tiles() -> None:
    """Head: 65,536 x 64 float32 = 16 MiB; tiles 2 MiB; blocks and backbone up to 6 MiB. A second gradient: 16 more."""
    model = tied(65_536, 64)
    (batch,) = micro_batches([Rollout([5, 6, 7, 8] * 4, [False] * 8 + [True] * 8, "stop", [])], 64, pad_id=0)
    meter = Meter(torch.device("cpu"))
    meter.count_allocations = True
    with meter.span("update", allocations=True):
        hidden = model.hidden(batch)
        kept_mask = torch.ones(batch.num_tokens, dtype=torch.bool)
        student = LazyLogits(hidden.detach(), model.head)
        teacher = LazyLogits(torch.randn_like(hidden), model.head)
        result = fused(student, teacher, kept_mask, Divergence("reverse_kl"), 2 * MIB)
        hidden.backward(result.hidden_grad)
    assert model.head.weight.grad is not None
    assert 16 <= meter.memory()["memory/update_extra_mib"] < 16 + 2 + 6


def test_the_gradient_of_a_tied_model_equals_autograds() -> None:
    model = tied(50, 16)
    rollouts = [
        Rollout([3, 4, 3, 9, 4], [False, False, True, True, True], "stop", []),
        Rollout([7, 8], [False, True], "stop", []),
    ]
    (batch,) = micro_batches(rollouts, 64, pad_id=0)
    model.hidden(batch).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    hidden = model.module.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    hidden[batch.rows, batch.columns].square().sum().backward()
    expected = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
