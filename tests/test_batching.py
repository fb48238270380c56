"""Micro-batches: every response token exactly once, predicted from the place to its left, prompts and tools never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tip_exp.batching import micro_batches
from tip_exp.rollout.types import Rollout


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """A prompt, then tokens that the student or a tool wrote, in any order."""
    prompt = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    rest = draw(st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=1, max_size=8))
    return Rollout(
        prompt + [token for token, _ in rest], [False] * len(prompt) + [mine for _, mine in rest], "stop", []
    )


@given(st.lists(rollouts(), min_size=1, max_size=6), st.integers(12, 40))
def test_every_response_token_is_there_once_and_predicted_from_its_left(steps: list[Rollout], budget: int) -> None:
    seen: dict[tuple[int, int], int] = {}
    for batch in micro_batches(steps, budget, pad_id=0):
        assert batch.input_ids.numel() <= budget
        assert (batch.attention_mask == (batch.input_ids != 0)).all()
        for n in range(batch.num_tokens):
            row, column, rollout = int(batch.rows[n]), int(batch.columns[n]), int(batch.rollout[n])
            assert int(batch.input_ids[row, column + 1]) == int(batch.token_ids[n])
            key = (rollout, int(batch.position[n]))
            assert key not in seen
            seen[key] = int(batch.token_ids[n])
    expected = {(i, j): token for i, r in enumerate(steps) for j, token in enumerate(r.response_ids)}
    assert seen == expected


def test_lengths_are_sorted_so_that_little_is_padding() -> None:
    def of(length: int) -> Rollout:
        return Rollout([1] * length, [False] + [True] * (length - 1), "stop", [])

    shapes = [tuple(b.input_ids.shape) for b in micro_batches([of(2), of(8), of(2), of(8)], 16, pad_id=0)]
    assert shapes == [(2, 8), (2, 2)]  # 16 + 4 places for 20 tokens
