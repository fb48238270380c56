"""Micro-batches: every response token exactly once, predicted from the place to its left, prompts and tools never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tip_exp.models.micro_batch import micro_batches
from tip_exp.types import Rollout


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


@given(st.lists(rollouts(), min_size=1, max_size=6), st.integers(12, 40))
def test_packed_rows_hold_the_same_tokens_without_a_pad(steps: list[Rollout], budget: int) -> None:
    def told(packing: bool) -> set[tuple[int, int, int]]:
        batches = micro_batches(steps, budget, pad_id=0, packing=packing)
        found = [zip(b.rollout.tolist(), b.position.tolist(), b.token_ids.tolist(), strict=True) for b in batches]
        return {token for one in found for token in one}

    assert told(True) == told(False)
    places = 0
    for batch in micro_batches(steps, budget, pad_id=0, packing=True):
        assert batch.lengths is not None and batch.num_positions == sum(batch.lengths) <= budget
        assert bool((batch.input_ids != 0).all()) and batch.attention_mask.shape == batch.input_ids.shape
        starts = {sum(batch.lengths[:i]) for i in range(len(batch.lengths))}
        for n in range(batch.num_tokens):
            column = int(batch.columns[n])
            assert int(batch.input_ids[0, column + 1]) == int(batch.token_ids[n]) and column + 1 not in starts
        places += batch.num_positions
    assert places == sum(len(one.token_ids) for one in steps)


def of(length: int) -> Rollout:
    return Rollout([1] * length, [False] + [True] * (length - 1), "stop", [])


def test_packing_fills_the_first_room() -> None:
    steps = [of(2), of(9), of(6), of(3), of(4)]
    packed = micro_batches(steps, 12, pad_id=0, packing=True)
    assert [b.lengths for b in packed] == [
        (9, 3),
        (2, 6, 4),
    ]  # longest first: 9; 6; 4 beside 6; 3 beside 9; 2 beside 6, 4


def test_lengths_are_sorted_so_that_little_is_padding() -> None:
    shapes = [tuple(b.input_ids.shape) for b in micro_batches([of(2), of(8), of(2), of(8)], 16, pad_id=0)]
    assert shapes == [(2, 8), (2, 2)]  # 16 + 4 places for 20 tokens
