"""Memory of one micro-batch from sizes alone, without torch: what a forward and a backward pass hold, and the loss.

Bytes per position of a Llama or Qwen with sdpa and float32 norms, w bytes per number; MLP width I, query and key widths
Q and K over all heads, hidden size H, T positions per sequence. Read off the layers, and compared with torch's
allocations by tests/estimate.

    kept per layer  w (4 I + A) + (2 w + 4) 2 H + [(w + 4) (Q + K)]   A = 3 Q + 2 K packed, 4 Q + T padded
    kept once       (w + 4) H + w H                 final norm, embedding
    forward         w (4 H + max(3 I, 4 Q + 2 K))   temporaries, besides what is kept
    backward        max(w (2 I - H), 17 H)          temporaries, besides what is kept

[] only with query and key norms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tip_exp.config.schema import LearnerConfig, LoraConfig, RunConfig
from tip_exp.estimate.shapes import ModelShape
from tip_exp.utils.units import MIB

FLOAT32 = 4
# Copies of logits that autograd holds at the peak of a divergence, measured; 5 for the others.
AUTOGRAD_COPIES = {"jsd": 9, "skew_reverse_kl": 9, "skew_forward_kl": 8}
CLOSED_FORM_KL = ("reverse_kl", "forward_kl")  # have hand-written gradients, so that tiles need no whole rows
# Of losses/tiling.py, which imports torch: rows of a tile, logits per GEMM and per block of elementwise operations.
MAX_ROWS = 1024
GEMM_ELEMENTS, BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 40}, {"cpu": 1 << 18, "cuda": 1 << 23}
NUM_SCRATCH, GROUP, TOP_K = 3, 64, 10
UPDATE_RATIO_WIDTH = 12  # bytes per number of the update whose norm is taken: float32, and once more in float64
CONVERTED_ROWS = 1024  # rows of a 16-bit head that a CPU converts at a time


class BatchSize(NamedTuple):
    """A micro-batch: `sequences` of `length` positions each, of which `tokens` are response tokens in all."""

    sequences: int
    length: int
    tokens: float

    @property
    def positions(self) -> int:
        return self.sequences * self.length


def trained_lengths(config: RunConfig) -> tuple[int, int]:
    """Positions and response tokens of the longest rollout that the learner reads."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    agent = config.agent
    length = prompt + response
    if agent is not None and agent.max_train_tokens is not None:
        length = min(length, agent.max_train_tokens)
    return length, round(length * response / (prompt + response))


def largest_micro_batch(config: RunConfig, rollouts: int) -> BatchSize:
    """The fullest micro-batch of a rank with `rollouts` rollouts: as many equal sequences as fill the token budget.

    Rollouts of every length occur, so that a micro-batch can be full although the longest ones do not fill it.
    """
    length, response = trained_lengths(config)
    budget = config.learner.micro_batch_tokens
    sequences = min(rollouts, math.ceil(budget / length))
    fitting = min(length, budget // sequences)
    return BatchSize(sequences, fitting, sequences * fitting * response / length)


def kept_per_layer(model: ModelShape, width: int, mask_length: int) -> float:
    """Bytes kept for the backward pass of one position in one layer.

    `width`: bytes per number. `mask_length`: positions per sequence, or 0 for packed rows, which have no mask.
    """
    # Query, key, value and output, once more as a packed row; with a mask, sdpa repeats keys and values.
    attention = 4 * model.query + mask_length if mask_length else 3 * model.query + 2 * model.key
    qk_norms = (width + 4) * (model.query + model.key) if model.qk_norm else 0
    return width * (4 * model.intermediate + attention) + (2 * width + 4) * 2 * model.hidden + qk_norms


def kept_for_backward(
    model: ModelShape, batch: BatchSize, width: int, *, packed: bool, checkpointing: bool, counted: float | None = None
) -> tuple[float, float]:
    """Bytes that the student's forward pass leaves for its backward pass, and what that recomputes at a time.

    `counted`: the bytes without checkpointing, if they were counted on tensors. With checkpointing every layer keeps
    its input alone, and is recomputed.
    """
    once = batch.positions * (2 * width + 4) * model.hidden
    if counted is None:
        layers = batch.positions * model.layers * kept_per_layer(model, width, 0 if packed else batch.length)
    else:
        layers = counted - once
    if checkpointing:
        return once + batch.positions * model.layers * width * model.hidden, layers / model.layers
    return once + layers, 0.0


def forward_bytes(model: ModelShape, positions: float, width: int) -> float:
    """Temporaries of a forward pass without gradient, in its largest layer."""
    return positions * width * (4 * model.hidden + max(3 * model.intermediate, 4 * model.query + 2 * model.key))


def backward_bytes(model: ModelShape, positions: float, width: int) -> float:
    """Temporaries of a backward pass besides what the forward pass kept."""
    return positions * max(width * (2 * model.intermediate - model.hidden), 17 * model.hidden)


def generation_bytes(model: ModelShape, rows: int, prompt: int, response: int, width: int) -> dict[str, float]:
    """Bytes of `rows` responses at a time by transformers: the KV cache at full length, and the largest temporary."""
    length = prompt + response
    cache = rows * length * model.cached * width
    repeated = 2 * model.query if model.query != model.key else 0  # keys and values of a masked layer, per query head
    decode = rows * length * (repeated + model.key) * width  # and the next key or value tensor beside the present one
    prefill = forward_bytes(model, rows * prompt, width) + rows * prompt * repeated * width
    # Logits in the model's dtype and float32; logits, then probabilities in float64, from which a token is drawn.
    draw = rows * model.vocab_size * (FLOAT32 + 16 + (width if width != FLOAT32 else 0))
    return {"KV cache": cache, "sampling": max(decode, prefill - cache, draw)}


def tile_bytes(
    config: RunConfig, tokens: float, vocab_size: int, *, whole_rows: bool, device: str, blocks: int = NUM_SCRATCH
) -> float:
    """Bytes of the logit tiles of both models and of `blocks` temporaries of a block (losses/tiling.py)."""
    budget = config.learner.tile_mib * MIB // (2 * FLOAT32)
    if whole_rows:
        held = max(1, min(tokens, MAX_ROWS, budget // vocab_size)) * vocab_size
        row = vocab_size
    else:
        budget = min(budget, GEMM_ELEMENTS[device])
        height = max(1, min(tokens, MAX_ROWS, math.isqrt(budget)))
        row = min(vocab_size, budget // height)
        held = height * row
    return FLOAT32 * (2 * held + blocks * min(held, max(BLOCK_ELEMENTS[device], row)))


def top_k_bytes(config: RunConfig, tokens: float, vocab_size: int) -> float:
    """Bytes of finding the most likely tokens of a tile's rows: ids of the candidates twice, and their logits."""
    rows = min(tokens, MAX_ROWS, config.learner.tile_mib * MIB // (2 * FLOAT32) // vocab_size)
    return rows * (2 * 8 + FLOAT32) * min(vocab_size, TOP_K * GROUP)


def autograd_copies(learner: LearnerConfig) -> int:
    """Copies of logits that autograd holds at the peak of the objective."""
    return AUTOGRAD_COPIES.get(learner.divergence, 5) if learner.estimator == "full" else 5


def materialized_bytes(
    config: RunConfig, teacher: ModelShape, student: ModelShape, tokens: float, head_width: int
) -> float:
    """Peak of the materialized loss over `tokens` response tokens of one micro-batch.

    The largest of three moments, in float32 logits: the divergence, at kept tokens only; all logits beside the kept
    rows of both models; all gradients beside a second gradient of the head. A 16-bit weight is copied to float32.
    """
    logits = tokens * min(teacher.vocab_size, student.vocab_size)
    learner, kept = config.learner, config.selector.retention * logits
    second_gradient = student.head if config.pair.student.lora is None else 0
    numbers = max(autograd_copies(learner) * kept, logits + 2 * kept, logits + second_gradient)
    return FLOAT32 * (numbers + (student.head if head_width != FLOAT32 else 0))


def adapter_parameters(model: ModelShape, lora: LoraConfig) -> float:
    """rank x (inputs + outputs), summed over all linear layers that have an adapter."""
    hidden, query, key, intermediate = model.hidden, model.query, model.key, model.intermediate
    sides = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + intermediate)
    names = list(sides) if lora.target_modules == "all-linear" else lora.target_modules
    return model.layers * lora.rank * sum(sides.get(name, hidden + intermediate) for name in names)
