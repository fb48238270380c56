"""A selector as the token mask of the DistillationTrainer and GKDTrainer of TRL 1.16 (docs/integrations.md).

Both models run once a micro-batch; statistics, mask and loss share their hidden states, and only kept tokens pass
through the heads in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tip_exp.api.loss import loss
from tip_exp.api.score import statistics
from tip_exp.api.select import make_selector, select

KEPT_FRAC = "kept_frac"  # in the trainer's logs, beside TRL's metrics
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "spatial_shapes", "image_position_ids")


def with_selector(
    trainer: Any,
    selector: Any = "soft_or",
    *,
    retention: float | None = None,
    average: Literal["token", "rollout"] = "token",
    quadrants: tuple[float, float] | None = None,
    tile_mib: int = 64,
    **overrides: Any,
) -> Any:
    """Make `trainer` train on the tokens that `selector` keeps, and return it. Evaluations still count every token.

    trainer  a DistillationTrainer or GKDTrainer of TRL 1.16.
    selector  an option of conf/selector, "my_module:my_rule", a function of statistics, a Selector, or a mapping with
        the keys of `selector` in conf/config.yaml, such as a section of a run's config.yaml.
    retention, quadrants, overrides  as in `tip_exp.select`.
    average  of the kept tokens' divergences. "token": their mean; with the selector `full` the loss is TRL's own.
        "rollout": mean in each response, then over responses, as training runs of this package do by default.

    The trainer's `beta` chooses the divergence: 0 forward KL, 1 reverse KL, between them JSD. Each
    micro-batch of each process has its own selection, so min-max scaling and budgets of the scope `batch` are over one
    micro-batch; its loss is weighted by its share of the completion tokens. Random selectors draw by the trainer's
    seed and step. Raises TypeError or ValueError that names the argument.
    """
    if isinstance(selector, Mapping):
        values = {str(key): value for key, value in selector.items() if key not in ("label", "defaults", "shadows")}
        if "score" not in values:
            raise ValueError(f"selector: a mapping needs score, the name of a rule; got the keys {', '.join(values)}")
        selector, overrides = values.pop("score"), values | overrides
    if retention is not None:
        overrides["retention"] = retention
    rule = make_selector(selector, quadrants, **overrides)
    if average not in ("token", "rollout"):
        raise ValueError(f"average: token or rollout; got {average!r}")
    if hasattr(trainer, "_get_last_hidden_state") and hasattr(trainer, "_compute_loss"):
        if trainer.temperature != 1:
            raise ValueError(
                f"trainer: its temperature is {trainer.temperature}, which TRL applies to the divergence; statistics "
                "and loss are those of temperature 1, so set temperature=1.0 in DistillationConfig"
            )
        trainer._compute_loss = _Distillation(trainer, _Masked(trainer, rule, average, tile_mib))
    elif hasattr(trainer, "generalized_jsd_loss"):
        trainer.compute_loss = _Gkd(trainer, _Masked(trainer, rule, average, tile_mib))
    else:
        raise TypeError(f"trainer: a DistillationTrainer or GKDTrainer of TRL 1.16; got {type(trainer).__name__}")
    return trainer


class _Masked:
    """The loss of one micro-batch of a trainer, from hidden states of both models."""

    def __init__(self, trainer: Any, rule: Any, average: Literal["token", "rollout"], tile_mib: int) -> None:
        self.trainer, self.rule, self.tile_mib = trainer, rule, tile_mib
        self.average: Literal["token", "rollout"] = average
        beta = float(trainer.beta)
        self.divergence: dict[str, Any] = {"divergence": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")}
        if self.divergence["divergence"] == "jsd":
            self.divergence["jsd_beta"] = beta

    def __call__(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor,
        models: tuple[Any, Any],
        token_ids: Tensor,
        mask: Tensor,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, summed student entropy and number of completion tokens.

        hidden, teacher_hidden (B, T, D): the states that predict token_ids (B, T). mask (B, T): completion tokens.
        num_items: completion tokens of the optimizer step over the number of processes; None: this micro-batch's.
        """
        for model in models:
            if hasattr(model.get_output_embeddings().weight, "full_tensor"):  # a DTensor
                raise ValueError("trainer: output heads that FSDP2 shards are not supported; use DDP or one process")
        mask = mask.bool()
        hidden, teacher_hidden, sequence = hidden[mask], teacher_hidden[mask].to(hidden.device), mask.nonzero()[:, 0]
        num_tokens = mask.sum()
        if len(hidden) == 0:
            return hidden.sum(), hidden.new_zeros(()).detach(), num_tokens
        wanted = {*self.rule.required_stats, "entropy"}
        stats = statistics(hidden, teacher_hidden, *models, token_ids[mask], statistics=wanted, tile_mib=self.tile_mib)
        step = int(self.trainer.state.global_step) + 1
        stats |= {"sequence": sequence, "micro_batch": torch.zeros_like(sequence)}
        kept, weights = select(stats, self.rule, seed=self.trainer.args.seed, step=step)
        self.trainer._metrics["train"][KEPT_FRAC].append(float(kept.float().mean()))
        value = loss(
            hidden, teacher_hidden, *models, kept, sequence=sequence, weights=weights, average=self.average,
            tile_mib=self.tile_mib, **self.divergence,
        )  # fmt: skip
        share = 1.0 if num_items is None else num_tokens / num_items
        return value * share, stats["entropy"].sum(), num_tokens


class _Distillation:
    """In place of DistillationTrainer._compute_loss, which runs inside the student's distributed wrapper."""

    def __init__(self, trainer: Any, masked: _Masked) -> None:
        self.trainer, self.masked, self.original = trainer, masked, trainer._compute_loss

    def __call__(self, student: Any, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Tensor, Tensor]:
        trainer = self.trainer
        if not trainer.model.training:
            return self.original(student, inputs, num_items)
        if images := [name for name in IMAGE_INPUTS if name in inputs]:
            raise ValueError(f"trainer: prompts with images are not supported ({', '.join(images)})")
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        length = inputs["completion_ids"].size(1)
        hidden = trainer._get_last_hidden_state(student, input_ids, attention_mask, length)
        trainer.teacher_model.eval()
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with torch.no_grad():
            teacher_hidden = trainer._forward_redirection(
                trainer.teacher_model, teacher, trainer._get_last_hidden_state,
                teacher, input_ids, attention_mask, length,
            )  # fmt: skip
        return self.masked(hidden, teacher_hidden, (student, teacher), inputs["completion_ids"], mask, num_items)


class _Gkd:
    """In place of GKDTrainer.compute_loss."""

    def __init__(self, trainer: Any, masked: _Masked) -> None:
        self.trainer, self.masked, self.original = trainer, masked, trainer.compute_loss

    def __call__(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer = self.trainer
        if not trainer.model.training or return_outputs:
            return self.original(model, inputs, return_outputs, num_items_in_batch)
        sequences = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        # Through the wrapper's forward, so that gradients are averaged over processes; one position's logits are made.
        options: dict[str, Any] = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1}
        hidden = model(**sequences, **options).hidden_states[-1][:, :-1]
        trainer.teacher_model.eval()
        with torch.no_grad():
            teacher_hidden = trainer.teacher_model(**sequences, **options).hidden_states[-1][:, :-1]
        models = tuple(map(trainer.accelerator.unwrap_model, (model, trainer.teacher_model)))
        labels = inputs["labels"][:, 1:]
        return self.masked(
            hidden, teacher_hidden, models, inputs["input_ids"][:, 1:], labels != -100, num_items_in_batch
        )[0]  # fmt: skip
