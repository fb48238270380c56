"""Micro-batches hold every response token once, predicted from the position to its left, and no other token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tip_exp.models.micro_batch import group, micro_batches
from tip_exp.types import Rollout


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """A prompt, then tokens that the student or a tool wrote, in any order."""
    prompt = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    following = draw(st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=1, max_size=8))
    return Rollout(
        prompt + [token for token, _ in following],
        [False] * len(prompt) + [written for _, written in following],
        "stop",
        [],
    )


@given(st.lists(rollouts(), min_size=1, max_size=6), st.integers(12, 40))
def test_every_response_token_occurs_once_and_is_predicted_from_its_left(steps: list[Rollout], budget: int) -> None:
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
    def tokens(packing: bool) -> set[tuple[int, int, int]]:
        batches = micro_batches(steps, budget, pad_id=0, packing=packing)
        triples = [zip(b.rollout.tolist(), b.position.tolist(), b.token_ids.tolist(), strict=True) for b in batches]
        return {token for of_batch in triples for token in of_batch}

    assert tokens(packing=True) == tokens(packing=False)
    num_positions = 0
    for batch in micro_batches(steps, budget, pad_id=0, packing=True):
        assert batch.lengths is not None and batch.num_positions == sum(batch.lengths) <= budget
        assert bool((batch.input_ids != 0).all()) and batch.attention_mask.shape == batch.input_ids.shape
        starts = {sum(batch.lengths[:i]) for i in range(len(batch.lengths))}
        for n in range(batch.num_tokens):
            column = int(batch.columns[n])
            assert int(batch.input_ids[0, column + 1]) == int(batch.token_ids[n]) and column + 1 not in starts
        num_positions += batch.num_positions
    assert num_positions == sum(len(rollout.token_ids) for rollout in steps)


def rollout_of(length: int) -> Rollout:
    return Rollout([1] * length, [False] + [True] * (length - 1), "stop", [])


def test_packing_is_first_fit_longest_first() -> None:
    steps = [rollout_of(2), rollout_of(9), rollout_of(6), rollout_of(3), rollout_of(4)]
    packed = micro_batches(steps, 12, pad_id=0, packing=True)
    assert [b.lengths for b in packed] == [
        (9, 3),
        (2, 6, 4),
    ]  # longest first: 9; 6; 4 beside 6; 3 beside 9; 2 beside 6, 4


@given(st.lists(st.integers(1, 12), max_size=30), st.booleans())
def test_a_micro_batch_takes_each_rollout_that_fits(lengths: list[int], packing: bool) -> None:
    """Against sizes that are computed anew for each rollout."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for members in groups if packing else groups[-1:]:
            together = [lengths[i] for i in [*members, index]]
            if (sum(together) if packing else max(together) * len(together)) <= 16:
                members.append(index)
                break
        else:
            groups.append([index])
    assert group(lengths, 16, packing=packing, indices=range(len(lengths))) == [sorted(members) for members in groups]


def test_rollouts_of_similar_length_share_a_batch() -> None:
    shapes = [
        tuple(b.input_ids.shape)
        for b in micro_batches([rollout_of(2), rollout_of(8), rollout_of(2), rollout_of(8)], 16, pad_id=0)
    ]
    assert shapes == [(2, 8), (2, 2)]  # 16 + 4 positions for 20 tokens
