"""Real TRL trainings of the embedded pair with a selector, against this package's own step on the same rollouts."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import gradients_of_step, make_learner
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.data import word_sums
from tip_exp.integrations.trl import with_selector
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL: pip install trl==1.16.0", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, BATCH, MAX_TOKENS = 2, 4, 48
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_grad_norm": 1e9,
    "learning_rate": 1e-3, "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "seed": 0,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def prompts(count: int) -> list[str]:
    stream = word_sums.stream("train", 0)
    return [next(stream).prompt for _ in range(count)]


def distillation_trainer(pair: Pair, folder: Path, beta: float = 1.0) -> Any:
    from trl.trainer.distillation_config import DistillationConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.distillation_trainer import DistillationTrainer  # pyright: ignore[reportMissingImports]

    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    texts = [pair.decode(pair.prompt_ids(prompt), with_special=True) for prompt in prompts(STEPS * BATCH)]
    return DistillationTrainer(
        model=pair.student.module,
        teacher_model=pair.teacher.module,
        args=DistillationConfig(output_dir=str(folder), max_completion_length=MAX_TOKENS, beta=beta, **COMMON),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=pair.tokenizer,
    )


def gkd_trainer(pair: Pair, folder: Path, beta: float = 1.0) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    stream = word_sums.stream("train", 0)
    problems = [next(stream) for _ in range(STEPS * BATCH)]
    messages = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.solution}] for p in problems]
    return GKDTrainer(
        model=pair.student.module,
        teacher_model=pair.teacher.module,
        args=GKDConfig(
            output_dir=str(folder), max_new_tokens=MAX_TOKENS, max_length=256, lmbda=1.0, temperature=1.0, beta=beta,
            **COMMON,
        ),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=pair.tokenizer,
    )  # fmt: skip


def first_step(trainer: Any, name: str) -> tuple[dict[str, Any], float, dict[str, Tensor]]:
    """Train; the inputs and the loss of the first call of this method, and the gradients of the first update.

    Both as means over the tokens that the student wrote, whatever number of tokens the trainer divides by.
    """
    calls: list[tuple[dict[str, Any], float]] = []
    gradients: dict[str, Tensor] = {}
    scales: list[float] = []
    compute = getattr(trainer, name)

    def recorded(model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        result = compute(model, inputs, *args, **options)
        value = float(result[0] if isinstance(result, tuple) else result)
        if (items := options.get("num_items_in_batch")) is not None:  # of GKDTrainer: those of the data set's responses
            scales.append(float(items) / int((inputs["labels"][:, 1:] != -100).sum()))
        calls.append((copies, value * (scales[0] if scales else 1.0)))
        return result

    def record(*_: Any) -> None:
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        for parameter_name, parameter in named:
            if parameter.grad is not None:
                gradients.setdefault(parameter_name, parameter.grad.clone())

    setattr(trainer, name, recorded)
    trainer.create_optimizer().register_step_pre_hook(record)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return *calls[0], {name: gradient * (scales[0] if scales else 1.0) for name, gradient in gradients.items()}


def rollouts_of(inputs: dict[str, Any]) -> list[Rollout]:
    """The rows of a batch of either trainer, without padding."""
    if "completion_ids" in inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        response = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)
    else:
        ids, attended, response = inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100
    keep = attended.bool()
    return [
        Rollout(row[k].tolist(), mask[k].bool().tolist(), "stop", [])
        for row, mask, k in zip(ids, response, keep, strict=True)
    ]


@pytest.mark.parametrize(("make", "method"), [(distillation_trainer, "_compute_loss"), (gkd_trainer, "compute_loss")])
@pytest.mark.parametrize(("selector", "retention", "average"), [("soft_or", 0.3, "rollout"), ("q3", 0.2, "token")])
def test_the_first_update_is_that_of_this_package(
    tiny_pair: Pair,
    tiny_config: RunConfig,
    tmp_path: Path,
    compose_run: Callable[..., RunConfig],
    make: Callable[..., Any],
    method: str,
    selector: str,
    retention: float,
    average: Any,
) -> None:
    before = copy.deepcopy(tiny_pair.student.module)
    trainer = with_selector(make(tiny_pair, tmp_path), selector, retention=retention, average=average)
    inputs, value, gradients = first_step(trainer, method)
    tiny_pair.student.module.load_state_dict(before.state_dict())
    tiny_pair.student.module.zero_grad()
    config = tiny_config.learner.model_copy(
        update={"grad_clip": 1e9, "average": average, "divergence": "reverse_kl", "warmup_steps": 0}
    )
    learner = make_learner(tiny_pair, config)
    chosen = compose_run(f"selector={selector}", f"selector.retention={retention}").selector
    learner.selector = type(learner.selector)(**chosen.rule_settings(), quadrants=learner.selector.quadrants)
    expected, report = gradients_of_step(learner, rollouts_of(inputs))
    assert value == pytest.approx(report.metrics["train/loss"], rel=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=2e-3, atol=2e-5 * float(expected[name].abs().max()) + 1e-7
        )
    logged = [row["kept_frac"] for row in trainer.state.log_history if "kept_frac" in row]
    assert len(logged) == STEPS and all(retention - 0.05 < share <= retention for share in logged)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("make", "method"), [(distillation_trainer, "_compute_loss"), (gkd_trainer, "compute_loss")])
def test_all_tokens_give_trls_own_loss(
    tiny_pair: Pair, tmp_path: Path, make: Callable[..., Any], method: str, beta: float
) -> None:
    trainer = make(tiny_pair, tmp_path, beta)
    own = getattr(trainer, method)
    values: list[tuple[float, float]] = []
    masked = getattr(with_selector(trainer, "full"), method)

    def both(*args: Any, **options: Any) -> Any:
        results = [compute(*args, **options) for compute in (own, masked)]
        values.append(tuple(float(r[0] if isinstance(r, tuple) else r) for r in results))
        return results[1]

    setattr(trainer, method, both)
    trainer.train()
    assert len(values) == STEPS
    for expected, value in values:
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_selector_of_a_runs_config(tiny_pair: Pair, tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    section = compose_run("selector=soft_or", "selector.retention=0.4").selector.model_dump()
    trainer = with_selector(distillation_trainer(tiny_pair, tmp_path), section, retention=0.2)
    rule = trainer._compute_loss.masked.rule
    assert (rule.score, rule.retention, rule.clip) == ("soft_or", 0.2, {"entropy": 0.98})
    with pytest.raises(ValueError, match="selector: a mapping needs score, the name of a rule; got the keys retention"):
        with_selector(trainer, {"retention": 0.2})


def test_other_objects_and_temperatures_are_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer: a DistillationTrainer or GKDTrainer of TRL 1\.16; got object"):
        with_selector(object())
    trainer = distillation_trainer(tiny_pair, tmp_path)
    trainer.temperature = 0.7
    with pytest.raises(ValueError, match=r"its temperature is 0\.7"):
        with_selector(trainer)
    trainer.temperature = 1.0
    with pytest.raises(ValueError, match="average: token or rollout; got 'sum'"):
        with_selector(trainer, average="sum")
