"""Influence of tokens against the inner product of a gradient per token, by autograd on whole logits in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.helpers import in_float64, sample_rollouts
from tests.reference import divergence
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tip_exp.learner.backward import Backward
from tip_exp.learner.influence import (
    Direction,
    dot,
    gradient,
    influence,
    mean_of,
    parameters_of,
    preconditioned,
    second_moments,
)
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import Head
from tip_exp.models.load import make_head
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.pair import Model, Pair
from tip_exp.selector.selector import Selection
from tip_exp.types import Rollout

VOCAB, TILE_BYTES = 40, 8 * 8 * 40 * 3  # three tokens a tile in float64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=5.0, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
}
# Norms and rotary embeddings of the others compute in float32 whatever the weights are.
TOLERANCE = {"gpt2": 1e-11}
STEP = [
    Rollout([3, 4, 5, 6, 7], [False, False, True, True, True], "stop", []),
    Rollout([8, 9, 10, 11, 12, 13, 14], [False, True, True, False, False, True, True], "stop", []),
    Rollout([15, 16, 17], [False, False, True], "length", []),
]


def random_model(kind: str, seed: int) -> Model:
    torch.manual_seed(seed)
    module = ARCHITECTURES[kind]().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return as_model(module)


def as_model(module: PreTrainedModel) -> Model:
    return Model(module, make_head(module, VOCAB))


def gradients_of_tokens(model: Model, teacher: Model, rollouts: list[Rollout], name: str) -> dict[tuple, Direction]:
    """{(rollout, position): gradient of this token's divergence}: by whole logits, one backward each."""
    parameters, gradients = parameters_of(model), {}
    for number, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        q = teacher.module(ids).logits[0].softmax(-1).detach()
        p = model.module(ids).logits[0].softmax(-1)
        values = divergence(name, p, q)
        for position, n in enumerate(i for i, written in enumerate(rollout.response_mask) if written):
            grads = torch.autograd.grad(
                values[n - 1], list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            gradients[number, position] = dict(zip(parameters, grads, strict=True))
    return gradients


def measured(
    student: Model, teacher: Model, batches: list[MicroBatch], name: str, direction: Direction
) -> dict[tuple, float]:
    hidden = [teacher.hidden(batch).detach() for batch in batches]
    values = influence(student, teacher.head, batches, hidden, direction, lambda _: Divergence(name), TILE_BYTES)
    keys = [key for batch in batches for key in zip(batch.rollout.tolist(), batch.position.tolist(), strict=True)]
    return dict(zip(keys, values.tolist(), strict=True))


def random_direction(model: Model) -> Direction:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in parameters_of(model).items()
    }


def assert_equal(
    values: dict[tuple, float], gradients: dict[tuple, Direction], direction: Direction, tolerance: float = 3e-6
) -> None:
    expected = {key: naive_dot(grads, direction) for key, grads in gradients.items()}
    scale = max(abs(value) for value in expected.values())
    assert values == pytest.approx(expected, rel=tolerance, abs=tolerance * scale)


def naive_dot(a: Direction, b: Direction) -> float:
    return sum(float((tensor.double() * b[name].double()).sum()) for name, tensor in a.items())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_influence_is_the_inner_product_with_each_tokens_gradient(kind: str, packing: bool) -> None:
    student, teacher = random_model(kind, 0), random_model(kind, 1)
    gradients = gradients_of_tokens(student, teacher, STEP, "reverse_kl")
    batches = micro_batches(STEP, 12, pad_id=0, packing=packing)
    assert len(batches) == 2
    direction = random_direction(student)
    values = measured(student, teacher, batches, "reverse_kl", direction)
    assert_equal(values, gradients, direction, TOLERANCE.get(kind, 3e-6))


@pytest.mark.parametrize(("tile_bytes", "rows"), [(TILE_BYTES, [3, 1]), (1, [1, 1, 1, 1])])
def test_a_tile_is_of_as_many_tokens_as_fit(monkeypatch: pytest.MonkeyPatch, tile_bytes: int, rows: list[int]) -> None:
    """Four response tokens; eight tiles of float64 are in memory at a time, of at least one token each."""
    student, teacher = random_model("gpt2", 0), random_model("gpt2", 1)
    batches, seen = micro_batches(STEP[1:2], 12, pad_id=0), []
    hidden, logits = [teacher.hidden(batch).detach() for batch in batches], Head.logits

    def recorded(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        if head is teacher.head:
            seen.append(len(hidden))
        return logits(head, hidden)

    monkeypatch.setattr(Head, "logits", recorded)
    divergence_of = partial(Divergence, "reverse_kl")
    arguments = student, teacher.head, batches, hidden, random_direction(student)
    assert len(influence(*arguments, lambda _: divergence_of(), tile_bytes)) == 4
    assert seen == rows


def test_no_micro_batch_has_no_influence() -> None:
    student, teacher = random_model("gpt2", 0), random_model("gpt2", 1)
    assert measured(student, teacher, [], "reverse_kl", random_direction(student)) == {}


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_influence_of_other_divergences(name: str) -> None:
    student, teacher = random_model("qwen3", 0), random_model("qwen3", 1)
    direction = random_direction(student)
    gradients = gradients_of_tokens(student, teacher, STEP, name)
    assert_equal(measured(student, teacher, micro_batches(STEP, 99, pad_id=0), name, direction), gradients, direction)


def adapted(pair: Pair, dtype: torch.dtype) -> Model:
    """The student with adapters away from their start, B = 0."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    module = peft.inject_adapter_in_model(config, pair.student.module, adapter_name="default")
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).to(dtype)
    return Model(module, make_head(module, pair.vocab_size))


def test_influence_of_adapters(tiny_pair: Pair) -> None:
    pair = in_float64(tiny_pair)
    student, rollouts = adapted(pair, torch.float64), sample_rollouts(tiny_pair)[:2]
    gradients = gradients_of_tokens(student, pair.teacher, rollouts, "reverse_kl")
    direction = random_direction(student)
    assert all(".lora_" in name for name in direction)
    batches = micro_batches(rollouts, 512, pad_id=pair.pad_id, packing=True)
    assert_equal(measured(student, pair.teacher, batches, "reverse_kl", direction), gradients, direction)


def gradient_of(student: Model, teacher: Model, batches: list[MicroBatch], selection: Selection) -> Direction:
    hidden = [teacher.hidden(batch).detach() for batch in batches]
    divergence_of = partial(Divergence, "reverse_kl")
    return gradient(Backward(TILE_BYTES), student, teacher.head, batches, hidden, selection, lambda _: divergence_of())


def select(kept: list[bool], weights: list[float] | None = None) -> Selection:
    mask = torch.tensor(kept)
    return Selection(mask, mask.double(), None if weights is None else torch.tensor(weights, dtype=torch.float64))


def test_gradient_is_the_weighted_mean_of_the_kept_tokens_gradients_and_leaves_grad_alone() -> None:
    student, teacher = random_model("qwen3", 0), random_model("qwen3", 1)
    gradients = gradients_of_tokens(student, teacher, STEP, "reverse_kl")
    batches = micro_batches(STEP, 7, pad_id=0)  # one rollout each, the longest first: 4, 3 and 1 response tokens
    assert [batch.num_tokens for batch in batches] == [4, 3, 1]
    kept, weights = [True, False, False, True, False, False, False, True], [1.0, 9.0, 9.0, 0.5, 9.0, 9.0, 9.0, 2.0]
    terms = [(1.0, gradients[1, 0]), (0.5, gradients[1, 3]), (2.0, gradients[2, 0])]
    for parameter in student.module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    result = gradient_of(student, teacher, batches, select(kept, weights))
    for name, parameter in student.module.named_parameters():
        expected = sum(weight * by_name[name] for weight, by_name in terms) / 3.5
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)
        assert parameter.grad is not None and bool((parameter.grad == 3.0).all())


def test_on_the_embedded_pair_in_float32_large_tokens_agree_to_a_ten_thousandth(tiny_pair: Pair) -> None:
    rollouts = sample_rollouts(tiny_pair)[:2]
    batches = micro_batches(rollouts, 512, pad_id=tiny_pair.pad_id, packing=True)
    num_tokens = sum(batch.num_tokens for batch in batches)
    direction = gradient_of(tiny_pair.student, tiny_pair.teacher, batches, select([True] * num_tokens))
    values = measured(tiny_pair.student, tiny_pair.teacher, batches, "reverse_kl", direction)
    exact = in_float64(tiny_pair)
    expected = {
        key: naive_dot(grads, direction)
        for key, grads in gradients_of_tokens(exact.student, exact.teacher, rollouts, "reverse_kl").items()
    }
    mean_size = sum(map(abs, expected.values())) / num_tokens
    large = [key for key in expected if abs(expected[key]) > mean_size]
    assert len(large) >= 3
    assert [values[key] for key in large] == pytest.approx([expected[key] for key in large], rel=1e-4)
    # mean_n <g_n, g> = <g, g>
    assert sum(values.values()) / num_tokens == pytest.approx(dot(direction, direction), rel=1e-4)


def test_second_moments_are_adams_and_precondition_as_its_denominator_does() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.5), eps=1e-3)
    assert second_moments(optimizer, {"w": weight}, [{"w": torch.tensor([2.0])}]) == {"w": 4.0}  # before any step
    for grad in ([1.0, 4.0], [3.0, 0.0]):
        weight.grad = torch.tensor(grad)
        optimizer.step()
    # v = 0.5 (0.5 g1^2) + 0.5 g2^2 = [4.75, 4], corrected by 1 - 0.5^2 = 0.75
    moments = second_moments(optimizer, {"w": weight}, [])
    torch.testing.assert_close(moments["w"], torch.tensor([4.75, 4.0]) / 0.75)
    scaled = preconditioned({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, 0.0])}, eps=0.5)
    torch.testing.assert_close(scaled["w"], torch.tensor([1 / 2.5, 2 / 0.5]))


def test_means_of_gradients_and_of_their_squares() -> None:
    gradients = [{"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([4.0])}]
    assert {name: t.tolist() for name, t in mean_of(gradients).items()} == {"a": [2.0, 1.0], "b": [2.0]}
    assert {name: t.tolist() for name, t in mean_of(gradients, squared=True).items()} == {"a": [5.0, 5.0], "b": [8.0]}
    assert dot(*gradients) == 0.0  # 1 x 3 + 3 x -1; b is 0 in the first
    assert dot({}, gradients[0]) == 0.0  # no parameter has a gradient in both


def test_a_model_without_trainable_parameters_is_refused(tiny_pair: Pair) -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        parameters_of(tiny_pair.teacher)
