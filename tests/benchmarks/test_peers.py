"""TRL, Liger and the plot: needs the [bench] extra, so this module is skipped as a whole without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import e2e, measuring, plotting, tiny
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    REQUIRES,
    exact_gradients,
    make_case,
    random_mask,
    relative_error,
)

if measuring.missing(["trl", "liger_kernel", "matplotlib"]):
    pytest.skip("needs trl, liger-kernel and matplotlib: pip install 'tip_exp[bench]'", allow_module_level=True)


@pytest.mark.parametrize("retention", [1.0, 0.3])
@pytest.mark.parametrize("name", REQUIRES)
def test_peers_give_the_float64_gradient(name: str, retention: float) -> None:
    case = replace(make_case(20, 150, 8, 8, 10_000), kept_mask=random_mask(20, retention))
    exact = exact_gradients(case)
    case.student_weight.grad = None
    assert relative_error(IMPLEMENTATIONS[name](case), exact) < 2e-6


def test_both_trainers_get_the_same_prompts_and_learning_rates() -> None:
    pair, prompts = tiny.load(), tiny.prompts(8, 0)
    config = tiny.learner_config(num_steps=2, prompts_per_step=4)
    trainer = e2e.trl_trainer(pair, config, prompts, seed=0)
    texts = [row["prompt"] for row in trainer.train_dataset]
    assert [pair.tokenizer(text)["input_ids"] for text in texts] == [pair.prompt_ids(prompt) for prompt in prompts]
    # Linear warm-up over 5 steps: the first step has a fifth of the learning rate.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(config.lr / 5)


def test_plot_is_written_beside_the_csv(tmp_path: Path) -> None:
    rows: list[measuring.Row] = [
        {
            "implementation": "fused",
            "tokens": n,
            "vocab": 100,
            "retention": retention,
            "peak_extra_mib": 1.5,
            "cpu_s": 0.1,
        }
        for n in (8, 16)
        for retention in (1.0, 0.2)
    ]
    measuring.write_csv(rows, tmp_path / "loss.csv")
    svg_file = plotting.plot_loss(tmp_path / "loss.csv")
    assert svg_file == tmp_path / "loss.svg" and svg_file.read_text().startswith("<?xml")
