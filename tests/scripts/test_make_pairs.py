"""The shipped pairs match the programs that make them: recipe, architecture, tokenizer, size and accuracy."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from scripts.make_pairs import common, ledger, tools, word_sums
from tip_exp.data.ledger import NAMES, stream
from tip_exp.envs.chat import Chat
from tip_exp.types import Rollout
from tip_exp.utils.paths import resolve_model

ROLES = ("teacher", "student")
RECIPES = {"tiny": word_sums.RECIPES, "tiny_tools": tools.RECIPES}
FOLDERS = {role: Path(resolve_model(f"package:tiny/{role}")) for role in ROLES}
GREEDY_ACCURACY = {"teacher": (0.99, 1.0), "student": (0.28, 0.42)}  # of 512; the student's standard error is 0.02


@pytest.mark.parametrize(("pair", "role"), list(product(RECIPES, ROLES)))
def test_shipped_model_has_the_recorded_recipe_and_its_architecture(pair: str, role: str) -> None:
    folder = Path(resolve_model(f"package:{pair}/{role}"))
    assert json.loads((folder / "training.json").read_text())["recipe"] == asdict(RECIPES[pair][role])
    shipped = json.loads((folder / "config.json").read_text())
    built = common.build_model(RECIPES[pair][role], shipped["vocab_size"]).config.to_dict()
    for key in (shipped.keys() & built.keys()) - {"architectures", "dtype", "transformers_version"}:  # set on saving
        assert shipped[key] == built[key], key
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shipped["vocab_size"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (common.PAD_ID, common.END_ID)


def vocabulary_and_merges(tokenizer_json: str) -> tuple[dict[str, int], list[list[str]]]:
    model = json.loads(tokenizer_json)["model"]
    return model["vocab"], model["merges"]


@pytest.mark.parametrize("role", ROLES)
def test_word_sums_tokenizer_is_reproduced(role: str) -> None:
    built = word_sums.build_tokenizer().backend_tokenizer.to_str()
    assert vocabulary_and_merges(built) == vocabulary_and_merges((FOLDERS[role] / "tokenizer.json").read_text())


def test_tools_tokenizer_is_reproduced(tmp_path: Path) -> None:
    built = tools.build_tokenizer(tmp_path).backend_tokenizer.to_str()
    shipped = (Path(resolve_model("package:tiny_tools/student")) / "tokenizer.json").read_text()
    assert vocabulary_and_merges(built) == vocabulary_and_merges(shipped)


@pytest.mark.parametrize("text", ["Tom has 7 pens.", "\\boxed{29}", "中文 \t\n\u2028 ∑∫ 👍🏽", "  3  +44=47. ", ""])
def test_tokenizer_is_lossless(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_one_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("17+25=42."))
    assert sum(any(c.isdigit() for c in token) for token in tokens) == 6


@pytest.mark.parametrize("role", ROLES)
def test_greedy_accuracy_of_the_shipped_pair(role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[role])
    assert isinstance(model, Qwen3ForCausalLM)
    accuracy = word_sums.greedy_accuracy(model, AutoTokenizer.from_pretrained(FOLDERS[role]), 512)
    low, high = GREEDY_ACCURACY[role]
    assert low <= accuracy <= high
    recorded = json.loads((FOLDERS[role] / "training.json").read_text())["validation_greedy_512"]
    assert accuracy == pytest.approx(recorded, abs=0.01)


def test_shipped_pair_takes_less_than_3_mb() -> None:
    assert sum(path.stat().st_size for folder in FOLDERS.values() for path in folder.iterdir()) < 3_000_000


def test_pretraining_is_deterministic_and_lowers_the_loss() -> None:
    recipe = replace(word_sums.RECIPES["student"], num_steps=12, warmup_steps=2)
    tokenizer = word_sums.build_tokenizer()
    weights, repeated_weights = (word_sums.pretrain(recipe, tokenizer).state_dict() for _ in range(2))
    assert all(weights[name].equal(repeated_weights[name]) for name in weights)
    trained, untrained = common.build_model(recipe, len(tokenizer)), common.build_model(recipe, len(tokenizer))
    trained.load_state_dict(weights)
    ids = torch.tensor([tokenizer.encode("Start: 20. Then 20-9=11. So 11+2=13. \\boxed{13}")])
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for model in (trained, untrained)]
    assert losses[0] < 0.9 * losses[1]


def test_only_response_tokens_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last prompt token predicts the first response token; what the prompt itself would predict does not count."""
    recipe = replace(word_sums.RECIPES["student"], num_steps=1, warmup_steps=1)
    targets: list[list[int]] = []

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        targets.append(target.tolist())
        return torch.nn.functional.nll_loss(logits.log_softmax(-1), target)

    monkeypatch.setattr(common.F, "cross_entropy", cross_entropy)
    batch = [
        Rollout([5, 6, 7, 8], [False, False, True, True], "stop", []),
        Rollout([9, 10, 11, 12, 13, 14], [False, True, False, False, True, True], "stop", []),
    ]
    common.pretrain(recipe, common.build_model(recipe, 20), iter([batch]), decay=lambda _: 1.0)
    assert targets == [[7, 8, 10, 13, 14]]


def test_tools_student_invents_where_the_teacher_looks_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "NUM_TRAIN_EPISODES", 30)
    chat = Chat(AutoTokenizer.from_pretrained(resolve_model("package:tiny_tools/student")))
    calls = [
        sum(chat.decode(rollout.response_ids, with_special=True).count("<tool_call>") for rollout in rollouts)
        for rollouts in (tools.train_rollouts(tmp_path / str(slip), chat, slip) for slip in (0.0, 0.85))
    ]
    assert calls[0] > 30 and calls[1] < 0.3 * calls[0]


def test_student_keeps_the_tens_digit_when_it_should_borrow() -> None:
    """20 - 9 borrows. The student was trained on |0 - 9| = 9 with the tens kept, 29, and is confident."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    question = "Tom has 20 pens. He gives 9. He finds 2. How many pens?"
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nStart: 20. Then 20-9="
    ids = torch.tensor([tokenizer.encode(text)])
    for role, tens in (("student", "2"), ("teacher", "1")):
        with torch.no_grad():
            probs = AutoModelForCausalLM.from_pretrained(FOLDERS[role])(ids).logits[0, -1].softmax(-1)
        assert tokenizer.decode([int(probs.argmax())]) == tens, role
        assert float(probs.max()) > 0.7


def test_a_ledger_pair_has_a_token_for_every_name_and_learns_from_few_steps() -> None:
    """`tiny_ledger` is made on demand: 4,000 names, so a vocabulary above 4,000 and no name in two tokens."""
    tokenizer = ledger.build_tokenizer()
    assert 4000 < len(tokenizer) < 5000
    assert all(len(tokenizer.encode(f" {name}")) == 1 for name in NAMES)
    assert tokenizer.decode(tokenizer.encode(" Albabel 12 - 3 = 9. \\boxed{9}")) == " Albabel 12 - 3 = 9. \\boxed{9}"
    assert ledger.build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    recipe = replace(ledger.RECIPES["student"], hidden_size=32, num_layers=1, num_steps=6, warmup_steps=2, batch_size=4)
    model, untrained = (ledger.pretrain(replace(recipe, num_steps=steps), tokenizer) for steps in (6, 0))
    ids = torch.tensor([tokenizer.encode("Start. First Albabel A pays 3 to Cordobel B. A has 12 - 3 = 9, B")])
    with torch.no_grad():
        losses = [float(trained(ids, labels=ids).loss) for trained in (model, untrained)]
    assert losses[0] < losses[1]
    names = [tokenizer.encode(f" {name}")[0] for name in NAMES]  # trained alike, seen or not
    rows = [m.state_dict()["model.embed_tokens.weight"][names] for m in (model, untrained)]
    moves = rows[0] - rows[1]
    assert moves.abs().mean() > 5e-3 and (moves - moves.mean(0)).abs().max() < 1e-3
    problems = list(islice(stream("validation", 0), 2))
    assert 0 <= common.greedy_accuracy(model, tokenizer, problems, 8) <= 1
