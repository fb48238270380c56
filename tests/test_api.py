"""The library: tables of token statistics, selections, the loss as an autograd function, and `tip-exp score`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import tip_exp
from tests import reference
from tests.helpers import QUESTIONS, in_float64, make_learner, permute_ids, sample_rollouts, train_step
from tip_exp.api.command import read_texts, summary
from tip_exp.api.select import make_selector as make_preset
from tip_exp.config.schema import RunConfig
from tip_exp.launch import cli
from tip_exp.learner.selectors import make_selector
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Quadrants, Tokens
from tip_exp.utils.errors import ConfigError, DataError
from tip_exp.utils.paths import conf_dir, not_writable, resolve_model
from tip_exp.utils.seeds import seed_for

DOCS = Path(__file__).parents[1] / "docs"
STUDENT, TEACHER = "package:tiny/student", "package:tiny/teacher"
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
TEXTS = ["Start: 8. So 8+2=10.", "Start: 9."]


def random_model(seed: int, vocab: int = 61, width: int = 16, *, tied: bool = False) -> Qwen3ForCausalLM:
    """A small model in float64 with logits of standard deviation about 1."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double()


def naive_statistics(student: Any, teacher: Any, ids: list[int], columns: list[int], vocab: int) -> dict[str, Tensor]:
    """At the tokens in `columns` of one sequence, from whole float64 logits."""
    with torch.no_grad():
        z, t = (model(torch.tensor([ids])).logits[0, :, :vocab].double() for model in (student, teacher))
    before = [column - 1 for column in columns]
    p, q = z[before].softmax(-1), t[before].softmax(-1)
    token_ids = torch.tensor(ids)[columns]
    top = [[set(row.topk(10).indices.tolist()) for row in probabilities] for probabilities in (p, q)]
    return {
        "entropy": -(p * p.log()).sum(-1),
        "teacher_entropy": -(q * q.log()).sum(-1),
        "reverse_kl": reference.divergence("reverse_kl", p, q),
        "forward_kl": reference.divergence("forward_kl", p, q),
        "grad_norm": reference.grad_norm(z[before], t[before]),
        "jsd": reference.divergence("jsd", p, q),
        "student_logprob": p.log().gather(-1, token_ids[:, None])[:, 0],
        "teacher_logprob": q.log().gather(-1, token_ids[:, None])[:, 0],
        "topk_overlap": torch.tensor([len(a & b) / 10 for a, b in zip(*top, strict=True)], dtype=torch.float64),
        **reference.top_token_statistics(p, q, token_ids),
    }


def assert_statistics(frame: pd.DataFrame, expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(
            torch.tensor(frame[name].to_numpy()), values, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- import ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, tip_exp; tip_exp.__version__; dir(tip_exp); print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tip_exp" in loaded
    assert not set(loaded) & {"torch", "transformers", "pandas", "numpy", "pydantic", "omegaconf", "hydra"}


def test_what_the_package_has_and_has_not() -> None:
    assert set(tip_exp.__all__) <= set(dir(tip_exp))
    assert all(getattr(tip_exp, name) for name in tip_exp.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'scores'; it has .*score"):
        attrgetter("scores")(tip_exp)


# --- score -----------------------------------------------------------------------------------------------------------


def test_texts_without_prompts_score_every_token_but_the_first(tiny_pair: Pair) -> None:
    """Two texts, paths only; the second is the shorter one, so it is padded."""
    pair = in_float64(tiny_pair)
    frame = tip_exp.score(STUDENT, TEACHER, TEXTS, dtype=torch.float64)
    assert list(frame) == ["sequence", "position", "token_id", "token", *STATISTICS, "quadrant"]
    for i, text in enumerate(TEXTS):
        ids = pair.tokenizer(text)["input_ids"]
        part = frame[frame["sequence"] == i]
        assert part["token_id"].tolist() == ids[1:] and part["position"].tolist() == list(range(len(ids) - 1))
        assert "".join(part["token"]) == text[len(pair.tokenizer.decode(ids[:1])) :]
        expected = naive_statistics(pair.student.module, pair.teacher.module, ids, [*range(1, len(ids))], 406)
        assert_statistics(part, expected)
    high_entropy, high_divergence = frame["entropy"] >= 0.3, frame["reverse_kl"] >= 0.3
    names = {(True, True): "Q1", (True, False): "Q2", (False, True): "Q3", (False, False): "Q4"}
    assert frame["quadrant"].tolist() == [names[key] for key in zip(high_entropy, high_divergence, strict=True)]
    assert frame["quadrant"].nunique() > 1


def test_responses_follow_their_prompts_in_the_chat_template(tiny_pair: Pair) -> None:
    pair, prompts = in_float64(tiny_pair), QUESTIONS[:2]
    models = pair.student.module, pair.teacher.module
    frame = tip_exp.score(*models, TEXTS, prompts=prompts, tokenizer=pair.tokenizer)
    for i, (prompt, text) in enumerate(zip(prompts, TEXTS, strict=True)):
        prompt_ids = pair.prompt_ids(prompt)
        ids = prompt_ids + pair.tokenizer(text)["input_ids"]
        part = frame[frame["sequence"] == i]
        assert part["token_id"].tolist() == ids[len(prompt_ids) :]
        assert_statistics(part, naive_statistics(*models, ids, [*range(len(prompt_ids), len(ids))], 406))
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rendered = [pair.tokenizer.decode(pair.prompt_ids(prompt)) for prompt in prompts]
    again = tip_exp.score(*models, TEXTS, prompts=messages, tokenizer=pair.tokenizer)
    plain = tip_exp.score(*models, TEXTS, prompts=rendered, tokenizer=pair.tokenizer, chat=False)
    pd.testing.assert_frame_equal(again, frame)
    pd.testing.assert_frame_equal(plain, frame)


def test_models_of_different_width_are_compared_on_the_tokens_that_both_have() -> None:
    student, teacher = random_model(0, vocab=61), random_model(1, vocab=70, width=24)
    ids = [[5, 7, 60, 2], [1, 2, 3, 4, 5, 6]]
    frame = tip_exp.score(student, teacher, input_ids=ids)
    assert "token" not in frame  # there is no tokenizer
    for i, row in enumerate(ids):
        expected = naive_statistics(student, teacher, row, [*range(1, len(row))], 61)
        assert_statistics(frame[frame["sequence"] == i], expected)


def test_masks_say_what_is_read_and_what_is_scored() -> None:
    """Left padding and a mask with a gap, as a tensor; the same sequences as lists, one per micro-batch."""
    student, teacher = random_model(0).train(), random_model(1).eval()
    padded = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
    attention, response = torch.ones_like(padded), torch.zeros_like(padded)
    attention[0, :3] = 0
    response[0, 4:], response[1, 2], response[1, 4:] = 1, 1, 1
    student.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    frame = tip_exp.score(student, teacher, input_ids=padded, response_mask=response, attention_mask=attention)
    assert [module.training for module in student.modules()] == modes and True in modes and False in modes
    assert frame["sequence"].tolist() == [0, 0, 1, 1, 1] and frame["position"].tolist() == [0, 1, 0, 1, 2]
    assert frame["token_id"].tolist() == [12, 13, 23, 25, 26]
    assert_statistics(frame[:2], naive_statistics(student, teacher, [11, 12, 13], [1, 2], 61))
    assert_statistics(frame[2:], naive_statistics(student, teacher, padded[1].tolist(), [2, 4, 5], 61))
    rows, masks = [[11, 12, 13], padded[1].tolist()], [[0, 1, 1], response[1].tolist()]
    one_by_one = tip_exp.score(student, teacher, input_ids=rows, response_mask=masks, micro_batch_tokens=6, tile_mib=1)
    pd.testing.assert_frame_equal(one_by_one, frame, rtol=1e-9, atol=1e-11)


def test_only_what_is_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = random_model(0), random_model(1)
    ids = [[5, 7, 60, 2]]
    everything = tip_exp.score(student, teacher, input_ids=ids, quadrants=(2.0, 3.0))
    high_entropy, high_divergence = everything["entropy"] >= 2.0, everything["reverse_kl"] >= 3.0
    assert (everything["quadrant"].isin(["Q1", "Q2"]) == high_entropy).all()
    assert (everything["quadrant"].isin(["Q1", "Q3"]) == high_divergence).all()
    some = tip_exp.score(student, teacher, input_ids=ids, statistics=["quadrant", "jsd"], quadrants=(2.0, 3.0))
    assert list(some) == ["sequence", "position", "token_id", "jsd", "quadrant"]
    pd.testing.assert_frame_equal(some, everything[list(some)])
    monkeypatch.setattr("tip_exp.api.score.make_model", fail_for_second_hidden := CountingModels())
    alone = tip_exp.score(student, teacher, input_ids=ids, statistics="entropy")
    assert fail_for_second_hidden.calls == [student]
    pd.testing.assert_series_equal(alone["entropy"], everything["entropy"])


def test_influence_is_measured_on_request_against_the_mean_gradient_of_all_tokens() -> None:
    student, teacher = random_model(0), random_model(1)
    rows, masks = [[11, 12, 13], [22, 23, 24, 25, 26]], [[0, 1, 1], [0, 1, 0, 1, 1]]
    frame = tip_exp.score(
        student, teacher, input_ids=rows, response_mask=masks, statistics=["influence", "reverse_kl"], tile_mib=1
    )
    assert list(frame) == ["sequence", "position", "token_id", "reverse_kl", "influence"]
    gradients: list[Tensor] = []
    for row, mask in zip(rows, masks, strict=True):
        p, q = (model(torch.tensor([row])).logits[0].softmax(-1) for model in (student, teacher))
        divergences = reference.divergence("reverse_kl", p, q.detach())
        for n in (n for n, written in enumerate(mask) if written):
            grads = torch.autograd.grad(divergences[n - 1], list(student.parameters()), retain_graph=True)
            gradients.append(torch.cat([grad.flatten() for grad in grads]))
    matrix = torch.stack(gradients)
    values = torch.tensor(frame["influence"].to_numpy())  # Qwen3's norms compute in float32: not 1e-9
    torch.testing.assert_close(values, matrix @ matrix.mean(0), rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in student.parameters())


class CountingModels:
    """`make_model` that records which modules compute hidden states."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, module: Any, vocab_size: int) -> Any:
        from tip_exp.api.models import make_model

        model, calls = make_model(module, vocab_size), self.calls

        class Recording:
            head = model.head

            def hidden(self, batch: Any) -> Tensor:
                calls.append(module)
                return model.hidden(batch)

        return Recording()


def test_no_response_token_is_an_empty_table() -> None:
    frame = tip_exp.score(random_model(0), random_model(1), input_ids=[[3], [4]])
    assert len(frame) == 0 and {"sequence", "reverse_kl", "quadrant"} <= set(frame)


def test_a_teacher_with_the_same_tokens_under_other_ids(tmp_path: Path) -> None:
    """As in training; a teacher that is loaded already is not changed, so it is refused."""
    permute_ids(Path(resolve_model(TEACHER)), tmp_path / "teacher")
    scored = [tip_exp.score(STUDENT, teacher, TEXTS[0]) for teacher in (tmp_path / "teacher", TEACHER)]
    scored.append(tip_exp.score(STUDENT, tmp_path / "teacher", TEXTS[0], tokenizer=STUDENT))
    for frame in scored[1:]:
        pd.testing.assert_frame_equal(scored[0], frame, check_exact=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="tokens differ"):
        tip_exp.score(STUDENT, loaded, TEXTS[0])


IDS = [[5, 7]]
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to read": ({}, "give either texts or input_ids="),
    "two things to read": ({"texts": TEXTS, "input_ids": IDS}, "give either texts or input_ids="),
    "a mask of texts": ({"texts": TEXTS, "response_mask": [[1]]}, "belong to input_ids="),
    "prompts of ids": ({"input_ids": IDS, "prompts": ["a"]}, "prompts belong to texts"),
    "no tokenizer": ({"texts": TEXTS}, "tokenizer: texts need one"),
    "unknown statistic": ({"input_ids": IDS, "statistics": ["entropi"]}, "there is no entropi; there are entropy, "),
    "first token": ({"input_ids": IDS, "response_mask": [[1, 1]]}, r"input_ids\[0\]: its first token is a response"),
    "mask of another length": ({"input_ids": IDS, "response_mask": [[0, 1, 1]]}, "response_mask: its rows"),
    "empty row": ({"input_ids": [[5, 7], []]}, r"input_ids\[1\] has no token"),
    "id outside": ({"input_ids": [[5, 99]]}, "token id 99 is not one of the 61 ids"),
    "too long": ({"input_ids": [[1] * 33]}, "sequence 0 has 33 tokens with its prompt, but the student has 32"),
    "no model": (
        {"input_ids": IDS, "teacher": "package:tiny/nobody"},
        "teacher: no model in package:tiny/nobody .*, or one of package:tiny/student, package:tiny/te",
    ),
    "not a model": (
        {"input_ids": IDS, "student": 7},
        "student: a Hugging Face causal language model or a path; got in",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_wrong_argument_is_named(case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    models = {"student": random_model(0), "teacher": random_model(1)}
    with pytest.raises((ValueError, TypeError), match=message):
        tip_exp.score(**(models | arguments))


BAD_TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "ids as texts": ({"texts": [[1, 2]]}, r"texts\[0\]: a text; got list\. Token ids are given as input_ids="),
    "fewer prompts": ({"texts": TEXTS, "prompts": ["a"]}, "prompts: 1 for 2 texts"),
    "a rendered prompt": ({"texts": "4", "prompts": "<|im_start|>user"}, r"prompts\[0\] holds .* chat=False"),
    "a number as prompt": ({"texts": "4", "prompts": [3]}, r"prompts\[0\]: a text or a list of messages"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_wrong_text_is_named(case: str) -> None:
    arguments, message = BAD_TEXTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        tip_exp.score(STUDENT, TEACHER, **arguments)


def test_different_tokenizers_are_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(STUDENT))
    for given in (None, tokenizer, STUDENT):  # the student's may be given; it is compared all the same
        with pytest.raises(ValueError, match="must share one tokenizer"):
            tip_exp.score(STUDENT, "package:tiny_tools/teacher", TEXTS, tokenizer=given)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_hidden_states_are_those_of_the_table() -> None:
    student, teacher = random_model(0), random_model(1, vocab=70, width=24)
    ids = torch.tensor([[5, 7, 60, 2], [1, 2, 3, 4]])
    hidden = [model.model(ids).last_hidden_state[:, :-1] for model in (student, teacher)]
    frame = tip_exp.score(student, teacher, input_ids=ids)
    stats = tip_exp.statistics(*hidden, student, teacher, ids[:, 1:])
    heads = student.lm_head, teacher.lm_head.weight
    of_heads = tip_exp.statistics(*hidden, *heads, ids[:, 1:], statistics=["jsd", "entropy"])
    assert list(stats) == list(STATISTICS) and list(of_heads) == ["entropy", "jsd"]
    for name, values in stats.items():
        assert values.shape == (2, 3)
        torch.testing.assert_close(values.flatten(), torch.tensor(frame[name].to_numpy()), **CLOSE)
    torch.testing.assert_close(of_heads["jsd"], stats["jsd"], **CLOSE)
    with pytest.raises(ValueError, match=r"token_ids has the shape \(2, 4\), so student_hidden"):
        tip_exp.statistics(*hidden, *heads, ids)


# --- select ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stats() -> pd.DataFrame:
    """Three sequences of 4, 3 and 1 tokens, without index 0, so that it is seen that the index is kept."""
    g = torch.Generator().manual_seed(0)
    frame = pd.DataFrame({name: torch.rand(8, generator=g).numpy() for name in STATISTICS}, index=range(10, 18))
    return frame.assign(sequence=[4, 4, 4, 4, 7, 7, 7, 9], position=[0, 1, 2, 3, 0, 1, 2, 0])


@pytest.mark.parametrize("name", ["soft_or", "random"])
def test_the_kept_set_is_that_of_a_training_run(
    name: str, tiny_pair: Pair, compose_run: Callable[..., RunConfig]
) -> None:
    """One step of a learner; then `score` on the rollouts before the step and `select`."""
    config, pair = compose_run(f"selector={name}", "selector.retention=0.2"), in_float64(tiny_pair)
    rollouts = sample_rollouts(tiny_pair)
    frame = tip_exp.score(
        pair.student.module,
        pair.teacher.module,
        input_ids=[rollout.token_ids for rollout in rollouts],
        response_mask=[rollout.response_mask for rollout in rollouts],
    )
    learner = make_learner(pair, config.learner)
    learner.selector = make_selector(config)
    report = train_step(learner, rollouts, step=3)
    assert len(frame) == len(report.tokens)
    order = (report.tokens.rollout * 10_000 + report.tokens.position).argsort()  # the learner's tokens are not sorted
    expected = report.selection.kept_mask[order].tolist()
    assert 0 < sum(expected) < 0.21 * len(expected)
    assert tip_exp.select(frame, name, retention=0.2, step=3).kept.tolist() == expected
    tensors = report.statistics | {"sequence": report.tokens.rollout, "position": report.tokens.position}
    kept = tip_exp.select(tensors, name, retention=0.2, step=3).kept
    assert kept.equal(report.selection.kept_mask)
    assert (name == "random") != kept.equal(tip_exp.select(tensors, name, retention=0.2, step=4).kept)


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "selector").glob("*.yaml")))
def test_every_option_selects_as_a_run_does(
    name: str, stats: pd.DataFrame, compose_run: Callable[..., RunConfig]
) -> None:
    if name == "rule":
        return
    selector = make_selector(compose_run(f"selector={name}"))
    tokens = Tokens(
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), torch.zeros(8).long(), torch.tensor(stats["position"].values)
    )
    values = {statistic: torch.tensor(stats[statistic].to_numpy()) for statistic in STATISTICS}
    selection = selector(values, tokens, torch.Generator().manual_seed(seed_for("select", 0, 1)))
    kept, weights = tip_exp.select(stats, name)
    if selector.weight == "none":
        assert weights is None
    else:
        assert weights.tolist() == pytest.approx(selection.weights.tolist())
    assert kept.tolist() == selection.kept_mask.tolist() and kept.dtype == bool and kept.index.equals(stats.index)
    assert tip_exp.select(stats, selector).kept.equals(kept)


def test_a_function_is_a_rule(stats: pd.DataFrame) -> None:
    def certain(jsd: Tensor, teacher_entropy: Tensor) -> Tensor:
        return jsd * (1 - teacher_entropy)

    kept = tip_exp.select(stats, certain, retention=0.25, normalizer="none", clip={"jsd": 0.9}, scope="batch").kept
    score = stats["jsd"].clip(upper=stats["jsd"].quantile(0.9)) * (1 - stats["teacher_entropy"])
    assert set(stats.index[kept]) == set(score.nlargest(2).index)
    by_name = tip_exp.select(stats, "tip_exp.selector.scores:entropy", retention=0.25).kept
    assert by_name.equals(tip_exp.select(stats, "entropy", retention=0.25).kept)


def test_a_mask_of_padded_tensors(stats: pd.DataFrame) -> None:
    """Rows of 4, 3 and 1 tokens in a (3, 5) tensor: the same tokens as in the table, and none of the padding."""
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]).bool()
    padded = {name: torch.full((3, 5), torch.nan) for name in ("entropy", "reverse_kl")}
    for name, values in padded.items():
        values[mask] = torch.tensor(stats[name].to_numpy())
    kept, weights = tip_exp.select(padded, retention=0.5, weight="score", response_mask=mask)
    expected, expected_weights = tip_exp.select(stats, retention=0.5, weight="score")
    assert kept.shape == (3, 5) and not kept[~mask].any() and kept[mask].tolist() == expected.tolist()
    assert expected_weights[~expected].max() == 0 < expected_weights[expected].min()
    assert weights[mask].tolist() == expected_weights.tolist() and not weights[~mask].any()
    padded["micro_batch"] = torch.tensor([[0], [0], [1]]).expand(3, 5)
    of_batches = tip_exp.select(padded, normalize_over="micro_batch", response_mask=mask).kept
    with_batches = stats.assign(micro_batch=[0] * 7 + [1])
    assert of_batches[mask].tolist() == tip_exp.select(with_batches, normalize_over="micro_batch").kept.tolist()
    assert expected.sum() == 2 + 1  # floor(4 / 2), floor(3 / 2), floor(1 / 2)


def test_a_row_without_response_tokens_is_no_rollout() -> None:
    """FiRe drops a share of the rollouts: of the five with tokens, not of all ten."""
    mask = torch.arange(10)[:, None].expand(10, 2) % 2 == 1
    padded = {name: torch.rand(10, 2, generator=torch.Generator().manual_seed(0)) for name in STATISTICS}
    _, weights = tip_exp.select(padded, "fire", response_mask=mask)
    whole = {name: values[1::2] for name, values in padded.items()}
    _, expected = tip_exp.select(whole, "fire", response_mask=mask[1::2])
    assert weights[1::2].equal(expected) and expected.any()


BAD_SELECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "retention": ({"retention": 2}, "selector.retention: input should be less than or equal to 1; got 2"),
    "key": ({"retenton": 0.2}, "selector.retenton is not a key; did you mean selector.retention?"),
    "value": ({"order": "up"}, "selector.order: input should be 'top'"),
    "rule": ({"selector": "q1", "retention": 0.5}, "selector.score=q1 keeps every token of its quadrant"),
    "name": (
        {"selector": "soft_ro"},
        "^selector: 'soft_ro' is neither an option nor a rule; did you mean soft_or\\?; choose ca_",
    ),
    "function": ({"selector": lambda entropi: entropi}, "has the parameter entropi, which is no statistic; .* did you"),
    "micro-batch": ({"normalize_over": "micro_batch"}, "^normalize_over=micro_batch: stats lacks micro_batch"),
}


@pytest.mark.parametrize("case", BAD_SELECTIONS)
def test_a_wrong_selection_is_named(case: str, stats: pd.DataFrame) -> None:
    arguments, message = BAD_SELECTIONS[case]
    with pytest.raises(ValueError, match=message):
        tip_exp.select(stats, **arguments)


def test_statistics_may_be_whole_numbers() -> None:
    stats = {"entropy": torch.tensor([1, 4, 3, 2]), "sequence": torch.zeros(4, dtype=torch.long)}
    assert tip_exp.select(stats, "entropy", retention=0.5).kept.tolist() == [False, True, True, False]


def test_what_the_statistics_lack_is_named(stats: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="stats lacks forward_kl, which the selector q3 reads"):
        tip_exp.select(stats.drop(columns="forward_kl"), "q3")
    with pytest.raises(ValueError, match="stats lacks sequence"):
        tip_exp.select({"entropy": torch.ones(3)}, "entropy")
    with pytest.raises(ValueError, match=r"stats\['entropy'\] has the shape \(1, 3\), sequence \(1, 3\); both need"):
        tip_exp.select({"entropy": torch.ones(1, 3), "sequence": torch.zeros(1, 3)}, "entropy")
    with pytest.raises(FloatingPointError, match="entropy is not finite at 1 of 8 tokens"):
        tip_exp.select(stats.assign(entropy=[float("nan")] + [1.0] * 7), "entropy")


# --- loss ------------------------------------------------------------------------------------------------------------


def naive_loss(
    hidden: Tensor, teacher_hidden: Tensor, heads: Any, kept: Tensor, weights: Tensor, average: str, name: str
) -> Tensor:
    """By autograd on whole logits over the first 61 ids; sequences are the rows of (B, T)."""
    z, t = ((head(h)[..., :61]).softmax(-1) for h, head in zip((hidden, teacher_hidden), heads, strict=True))
    values = reference.divergence(name, z, t, 0.3, 0.2)
    if average == "rollout":
        rows = [(v[k] * w[k]).sum() / w[k].sum() for v, k, w in zip(values, kept, weights, strict=True) if k.any()]
        return torch.stack(rows).mean()
    total = (values[kept] * weights[kept]).sum()
    return total / weights[kept].sum() if average == "token" else total


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("average", ["token", "rollout", "sum"])
def test_value_and_gradients_are_those_of_whole_logits(average: str, weighted: bool, name: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 6, generator=g).double().requires_grad_()
    teacher_hidden = torch.randn(3, 4, 5, generator=g).double()
    heads = torch.nn.Linear(6, 61).double(), torch.nn.Linear(5, 70, bias=False).double()
    kept = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    weights = torch.linspace(0.5, 2, 12).double().view(3, 4)
    leaves = hidden, heads[0].weight, heads[0].bias
    expected = naive_loss(
        hidden, teacher_hidden, heads, kept, weights if weighted else torch.ones_like(weights), average, name
    )
    expected_grads = torch.autograd.grad(3 * expected, leaves)
    settings: dict[str, Any] = {"average": average, "divergence": name, "jsd_beta": 0.3, "tile_mib": 1}
    value = tip_exp.loss(hidden, teacher_hidden, *heads, kept, weights=weights if weighted else None, **settings)
    torch.testing.assert_close(value, expected, **CLOSE)
    for grad, of_naive in zip(torch.autograd.grad(3 * value, leaves), expected_grads, strict=True):
        torch.testing.assert_close(grad, of_naive, **CLOSE)
    flat = tip_exp.loss(
        hidden[kept],
        teacher_hidden[kept],
        *heads,
        sequence=kept.nonzero()[:, 0],
        weights=weights[kept] if weighted else None,
        **settings,
    )
    torch.testing.assert_close(flat, expected, **CLOSE)
    for grad, of_naive in zip(torch.autograd.grad(flat, leaves), expected_grads, strict=True):
        torch.testing.assert_close(3 * grad, of_naive, **CLOSE)
    assert heads[0].weight.grad is None, "autograd.grad leaves .grad alone"


def test_a_tied_head_gets_the_gradients_of_both_of_its_uses() -> None:
    student, teacher = random_model(0, tied=True), random_model(1)
    ids = torch.tensor([[5, 7, 60, 2], [1, 2, 3, 4]])
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state
    kept = torch.tensor([[0, 1, 1], [1, 0, 0]]).bool()
    p, q = (model(ids).logits[:, :-1].softmax(-1) for model in (student, teacher))
    reference.divergence("reverse_kl", p, q)[kept].mean().backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    teacher.zero_grad(set_to_none=True)
    hidden = student.model(ids).last_hidden_state
    value = tip_exp.loss(hidden[:, :-1], teacher_hidden[:, :-1], student, teacher, kept)
    value.backward(retain_graph=True)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    value.backward()  # the kept gradients are not those that were accumulated into
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, 2 * expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_loss_never_holds_whole_logits() -> None:
    """64 of 1,024 tokens, 8,192 ids: one model's logits are 32 MiB, those of the kept tokens 2 MiB, the head 1 MiB.

    Forward: the head's gradient 1 MiB, tiles 1 MiB, scratch and the gradient of hidden states 1 MiB. Backward: nothing,
    as autograd takes over the gradients that are there.
    """
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(1024, 32, generator=g) for _ in range(2))
    heads = [torch.nn.Linear(32, 8192, bias=False) for _ in range(2)]
    hidden.requires_grad_()
    kept = torch.arange(1024) % 16 == 0
    meter = Meter(torch.device("cpu"))
    meter.count_allocations = True
    with meter.span("forward", allocations=True):
        value = tip_exp.loss(hidden, teacher_hidden, *heads, kept, tile_mib=1)
    with meter.span("backward", allocations=True):
        value.backward()
    used = meter.memory()
    assert 1 < used["memory/forward_extra_mib"] < 3.5
    assert used["memory/backward_extra_mib"] < 0.2
    assert heads[0].weight.grad is not None


def test_the_loss_does_not_depend_on_autocast() -> None:
    """In autocast the products with a 16-bit head would have 16-bit inputs."""
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.nn.Linear(8, 40).bfloat16()
    arguments = hidden, torch.randn(64, 8), head, torch.nn.Linear(8, 40)
    value = tip_exp.loss(*arguments)
    grads = torch.autograd.grad(value, (hidden, head.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = tip_exp.loss(*arguments)
        cast_grads = torch.autograd.grad(cast, (hidden, head.weight))
    assert value.equal(cast) and value.dtype == torch.float32
    assert all(map(Tensor.equal, grads, cast_grads))
    with torch.no_grad():
        assert tip_exp.loss(*arguments).equal(value) and not tip_exp.loss(*arguments).requires_grad


@pytest.mark.parametrize("average", ["token", "rollout", "sum"])
def test_without_kept_tokens_the_loss_is_zero(average: Any) -> None:
    hidden, heads = torch.randn(2, 3, 8, requires_grad=True), [torch.nn.Linear(8, 40) for _ in range(2)]
    value = tip_exp.loss(hidden, torch.randn(2, 3, 8), *heads, torch.zeros(2, 3).bool(), average=average)
    value.backward()
    assert value == 0 and hidden.grad is not None and not hidden.grad.any()
    assert heads[0].weight.grad is not None and not heads[0].weight.grad.any()


HIDDEN, LINEAR = torch.randn(4, 8), torch.nn.Linear(8, 40)
BAD_LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "average": ({"average": "mean"}, "average: token, rollout, sum; got 'mean'"),
    "divergence": ({"divergence": "kl"}, "divergence: reverse_kl, .*; got 'kl'"),
    "beta": ({"jsd_beta": 1.0}, "jsd_beta: between 0 and 1; got 1.0"),
    "mask": ({"kept_mask": torch.ones(3)}, r"kept_mask has the shape \(3,\), the hidden states \(4,\)"),
    "sequence": ({"average": "rollout"}, r"average='rollout' of hidden states \(N, D\) needs sequence="),
    "tokens": ({"teacher_hidden": torch.randn(3, 8)}, "student_hidden has 4 positions and teacher_hidden 3"),
    "features": ({"student_hidden": torch.randn(4, 9)}, "student_hidden has 9 features, .* student takes 8"),
    "head": ({"teacher": torch.randn(8)}, r"teacher: a Hugging Face model, .* got a tensor of shape \(8,\)"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_a_wrong_argument_of_the_loss_is_named(case: str) -> None:
    arguments = {"student_hidden": HIDDEN, "teacher_hidden": HIDDEN, "student": LINEAR, "teacher": LINEAR}
    changes, message = BAD_LOSSES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        tip_exp.loss(**(arguments | changes))


# --- the command -----------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tip-exp", "score", "--student", STUDENT, "--teacher", TEACHER, *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": prompt, "response": text} for prompt, text in zip(QUESTIONS, TEXTS, strict=False)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--texts", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "t.parquet"), "--selector", "soft_or"]
    assert run_command(monkeypatch, *arguments, "--retention", "0.3") == 0
    frame = tip_exp.score(STUDENT, TEACHER, TEXTS, prompts=QUESTIONS[:2])
    written = pd.read_parquet(tmp_path / "t.parquet")
    kept = tip_exp.select(frame, "soft_or", retention=0.3).kept
    pd.testing.assert_frame_equal(written, frame.assign(kept=kept))
    out = capsys.readouterr().out
    assert out.startswith(f"{len(frame)} response tokens of 2 sequences\n")
    q4 = frame["quadrant"] == "Q4"
    (line,) = [line.split() for line in out.splitlines() if line.startswith("Q4")]
    largest = frame.nlargest(10, "reverse_kl")
    listed = out.partition("largest reverse KL\n")[2].splitlines()[2:-1]  # without the headings and the line of --out
    assert [[int(part) for part in row.split()[:2]] for row in listed] == largest[
        ["sequence", "position"]
    ].to_numpy().tolist()
    assert [json.dumps(token) in row for token, row in zip(largest["token"], listed, strict=True)] == [True] * 10
    assert line[1:3] == [str(q4.sum()), f"{q4.mean():.1%}"] and line[-1] == f"{kept[q4].mean():.1%}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "nothing.txt"], "--texts: there is no file nothing.txt"),
        (["--texts", "a.txt", "--out", "t.xlsx"], "--out: a name that ends in .parquet or .csv; got t.xlsx"),
        (["--texts", "a.txt", "--device", "cuda"], "device=cuda, but torch finds no CUDA device; use device=cpu"),
        (["--texts", "a.txt", "--dtype", "fp16"], "dtype=fp16: choose auto, float32, bfloat16 or float16"),
        (["--texts", "a.txt", "--device", "gpu"], "device=gpu: torch knows no such device"),
        (
            ["--texts", "a.txt", "--selector", "softor"],
            "'softor' is neither an option nor a rule; did you mean soft_or?",
        ),
        (["--texts", "a.txt", "--out", "no/t.parquet"], "--out: there is no folder no"),
        (["--texts", "a.txt", "--selector", "soft_or", "--retention", "2"], "selector.retention: input should be"),
        (["--texts", "a.txt", "--retention", "0.2"], "--retention needs --selector"),
        (
            ["--texts", "a.txt", "--statistics", "entropy", "--selector", "divergence"],
            "--statistics lacks reverse_kl, which",
        ),
        (["--texts", "a.txt", "--statistics", "entropi"], "--statistics: there is no entropi; did you mean entropy?"),
    ],
)
def test_an_error_of_the_command_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tip_exp.api.score.module_of", None)  # no model loads first
    (tmp_path / "a.txt").write_text("Start: 8.\n")
    assert run_command(monkeypatch, *arguments) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ") and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert run_command(monkeypatch, *arguments) and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", (["one", "two"], None)),
        ("a.jsonl", '{"text": "one"}\n', (["one"], None)),
        ("a.jsonl", '{"prompt": "p", "response": "one"}\n\n', (["one"], ["p"])),
        ("a.jsonl", '{"text": "one"}\n{"prompt": "p", "response": "two"}', 'line 2: either every line has a "prompt"'),
        ("a.jsonl", '{"text": "one\u2028two"}\n', (["one\u2028two"], None)),  # no end of a line in JSON
        ("a.jsonl", "one\n", "line 1: not JSON"),
        ("a.jsonl", '{"answer": "one"}\n', 'line 1: needs "response" with "prompt"'),
        ("a.txt", "\n", "has no line with a text"),
        ("a.txt", "\ufeffone\n", (["one"], None)),  # with a byte order mark
        ("a.txt", "one\udcff\n", r"a\.txt is no text in UTF-8 \("),
    ],
)
def test_files_of_texts(name: str, text: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            read_texts(tmp_path / name)
    else:
        assert read_texts(tmp_path / name) == expected


def test_wrong_options_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """In a process without torch: each refusal is its own and not that torch is missing."""
    (tmp_path / "a.txt").write_text("Start: 8.\n")
    cases = {
        "score --student a --teacher b --texts a.txt": "--student must be a folder with a config.json, a hub id",
        "score --student o/a --teacher o/b --texts a.txt --selector softor": "did you mean soft_or",
        "score --student o/a --teacher o/b --texts a.txt --selector soft_or --retention 20": "selector.retention: inp",
        "replay nope": "holds no non_finite_",
    }
    code = "import sys; sys.modules['torch'] = None; from tip_exp.launch.cli import main; main()"
    for arguments, message in cases.items():
        line = [sys.executable, "-c", code, *arguments.split()]
        ended = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 2 and message in ended.stderr, ended.stderr


def test_a_table_as_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    out = tmp_path / "t.csv"
    assert run_command(monkeypatch, "--texts", str(tmp_path / "a.txt"), "--out", str(out)) == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(out), tip_exp.score(STUDENT, TEACHER, TEXTS[:1]), check_dtype=False, atol=1e-5, check_exact=False
    )


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not not_writable(tmp_path / "new" / "t.csv") and not not_writable(tmp_path / "file")
    assert not_writable(tmp_path / "file" / "t.csv") == f"{tmp_path / 'file'} is no folder to write into"


def test_the_summary_of_few_columns(stats: pd.DataFrame) -> None:
    assert summary(stats[["sequence", "entropy"]]) == "8 response tokens of 3 sequences"


# --- documentation ---------------------------------------------------------------------------------------------------


def test_the_notebook_runs() -> None:
    notebook = json.loads((DOCS / "token_importance.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"display": lambda *_: None}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "the notebook is stored without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "token_importance.ipynb", "exec"), names)
    assert names["after"] < names["before"], "the step lowers the loss of its own tokens"
    assert names["stats"]["kept"].mean() <= 0.2


def test_the_snippets_of_the_library_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "library.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        if "# my_rules.py" in snippet:
            (tmp_path / "my_rules.py").write_text(snippet)
            continue
        exec(compile(snippet, "library.md", "exec"), names)
    assert len(snippets) >= 4


def test_the_loops_of_the_integrations_page_give_one_gradient() -> None:
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    snippets = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "with_selector" not in code]
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "integrations.md", "exec"), names)
    assert names["mean"] == pytest.approx(float(names["loss"].detach()), rel=1e-5)
    assert float(names["whole"].abs().max()) > 0
    torch.testing.assert_close(names["split"], names["whole"], rtol=1e-4, atol=1e-6)


def test_a_selector_and_its_error_types() -> None:
    with pytest.raises(ConfigError):
        tip_exp.select({}, "q1", retention=0.5)
    rule = make_preset("soft_or", retention=0.2)
    assert make_preset(rule) is rule and make_preset(rule, quadrants=(0.1, 2)).quadrants == Quadrants(0.1, 2.0)
    assert make_preset(rule, retention=0.3) == make_preset("soft_or", retention=0.3)
    for changes in ({"retention": 20}, {"retention": -1.0}, {"normalizer": "none"}, {"retenton": 0.3}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            tip_exp.select({}, rule, **changes)
