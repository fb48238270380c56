"""The shipped pair is what its program makes: format, recipe, size, and the accuracies the demonstration stands on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from scripts.make_pairs import word_sums as tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from tip_exp.utils.paths import resolve_model

ROLES = ("teacher", "student")
FOLDERS = {role: Path(resolve_model(f"package:tiny/{role}")) for role in ROLES}
ACCURACY = {"teacher": (0.99, 1.0), "student": (0.28, 0.42)}  # greedy, 512 problems; se about 0.02 for the student


@pytest.mark.parametrize("role", ROLES)
def test_record_and_config_are_those_of_the_recipe(role: str) -> None:
    record = json.loads((FOLDERS[role] / "training.json").read_text())
    assert record["recipe"] == asdict(tiny_pair.RECIPES[role])
    built = tiny_pair.build_model(tiny_pair.RECIPES[role], tiny_pair.build_tokenizer()).config.to_dict()
    shipped = json.loads((FOLDERS[role] / "config.json").read_text())
    written = ("architectures", "dtype", "transformers_version")  # what save_pretrained adds
    for key in (shipped.keys() & built.keys()) - set(written):
        assert shipped[key] == built[key], key
    assert shipped["head_dim"] == 32


def test_the_tokenizer_is_the_one_its_program_trains() -> None:
    made = json.loads(tiny_pair.build_tokenizer().backend_tokenizer.to_str())
    for role in ROLES:
        shipped = json.loads((FOLDERS[role] / "tokenizer.json").read_text())
        assert (
            shipped["model"]["vocab"] == made["model"]["vocab"]
            and shipped["model"]["merges"] == made["model"]["merges"]
        )


@pytest.mark.parametrize("text", ["Tom has 7 pens.", "\\boxed{29}", "中文 \t\n\u2028 ∑∫ 👍🏽", "  3  +44=47. ", ""])
def test_the_tokenizer_is_lossless(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("17+25=42."))
    assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)


@pytest.mark.parametrize("role", ROLES)
def test_accuracy_of_what_is_shipped(role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[role])
    assert isinstance(model, Qwen3ForCausalLM)
    accuracy = tiny_pair.greedy_accuracy(model, AutoTokenizer.from_pretrained(FOLDERS[role]), 512)
    low, high = ACCURACY[role]
    assert low <= accuracy <= high
    recorded = json.loads((FOLDERS[role] / "training.json").read_text())["greedy_accuracy_512"]
    assert accuracy == pytest.approx(recorded, abs=0.01)


def test_the_package_data_is_small() -> None:
    assert sum(path.stat().st_size for folder in FOLDERS.values() for path in folder.iterdir()) < 3_000_000


def test_pretraining_learns_and_is_deterministic() -> None:
    tokenizer = tiny_pair.build_tokenizer()
    recipe = replace(tiny_pair.RECIPES["student"], num_steps=6, warmup_steps=2)
    first, again = (tiny_pair.pretrain(recipe, tokenizer).state_dict() for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
    fresh = tiny_pair.build_model(recipe, tokenizer).state_dict()
    assert not any(first[name].equal(fresh[name]) for name in first if "weight" in name)


def test_the_student_slips_where_it_was_taught_to() -> None:
    """20 - 9 borrows: its greedy answer is |0 - 9| = 9 with the tens kept, 29, and it is sure of it."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["student"])
    question = "Tom has 20 pens. He gives 9. He finds 2. How many pens?"
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nStart: 20. Then 20-9="
    ids = torch.tensor([tokenizer.encode(text)])
    for role, tens in (("student", "2"), ("teacher", "1")):
        with torch.no_grad():
            p = AutoModelForCausalLM.from_pretrained(FOLDERS[role])(ids).logits[0, -1].softmax(-1)
        assert tokenizer.decode([int(p.argmax())]) == tens, role
        assert float(p.max()) > 0.7
