"""Whole trainings of the embedded pair by TRL's DistillationTrainer and by this package, with equal settings.

Below a retention of 1, TRL's trainer has this package's selector as its mask (tip_exp.integrations.trl).
Equal: prompts and their order, steps, batch size, learning rate of every step, AdamW, clipping, reverse KL, sampling
from the student. The samples differ, as the random streams do. TRL's gradient checkpointing and bfloat16, on by
default, are off. Each training has its own process. Time runs from loaded models to the last update; accuracy is
measured afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import measuring, tiny
from tip_exp.config.schema import LearnerConfig
from tip_exp.integrations.trl import with_selector
from tip_exp.learner.adamw import make_optimizer
from tip_exp.learner.learner import Learner, learning_rate
from tip_exp.learner.teacher import Teacher
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter

IMPLEMENTATIONS = ("trl", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="4 steps of 16 rollouts, to see that it works")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rollouts", type=int, default=64, help="per step, one per prompt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--retentions", type=float, nargs="+", default=[1.0, 0.2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/e2e.csv"))


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.steps, arguments.rollouts, arguments.seeds = 4, 16, [0]
    implementations = IMPLEMENTATIONS
    if absent := measuring.missing(["trl"]):
        measuring.warn_missing(absent, "its rows are left out")
        implementations = IMPLEMENTATIONS[1:]
    rows: list[measuring.Row] = []
    for seed in arguments.seeds:
        for implementation, retention in product(implementations, arguments.retentions):
            options = implementation, retention, seed, arguments.steps, arguments.rollouts
            rows.append(measuring.in_child(measure_training, *options, threads=arguments.threads))
            measuring.write_csv(rows, arguments.out)
    print(f"{len(rows)} rows in {arguments.out}")


def measure_training(implementation: str, retention: float, seed: int, steps: int, rollouts: int) -> measuring.Row:
    """Cost of one training and the accuracy that it reaches."""
    torch.manual_seed(seed)
    pair = tiny.load()
    config = tiny.learner_config(num_steps=steps, prompts_per_step=rollouts)
    prompts = tiny.prompts(steps * rollouts, seed)
    if implementation == "trl":
        trainer = trl_trainer(pair, config, prompts, seed)
        if retention < 1:
            with_selector(trainer, tiny.selector(retention), average=config.average)
        cost, _ = measuring.cost_of(trainer.train)
        pair.student.module.eval()
    else:
        cost, _ = measuring.cost_of(lambda: train(pair, config, prompts, retention, seed))
    accuracy = tiny.accuracy(pair)
    row: measuring.Row = {
        "implementation": implementation,
        "retention": retention,
        "seed": seed,
        "steps": steps,
        "rollouts": rollouts,
        "wall_s": round(cost.wall_s, 2),
        "cpu_s": round(cost.cpu_s, 2),
        "peak_extra_mib": round(cost.peak_extra_mib, 1),
        "greedy": round(accuracy.greedy, 4),
        "sampled": round(accuracy.sampled, 4),
        "sampled_se": round(accuracy.sampled_se, 4),
    }
    measuring.print_row(row)
    return row


def train(pair: Pair, config: LearnerConfig, prompts: list[str], retention: float, seed: int) -> None:
    """The loop of a run without evaluations, files and logs."""
    sampler = tiny.make_sampler(pair)
    learner = Learner(pair, tiny.selector(retention), config, seed=seed, meter=Meter(torch.device("cpu")))
    teacher = Teacher(pair, config, learner.meter)
    for step in range(1, config.num_steps + 1):
        start = (step - 1) * config.prompts_per_step
        prompt_ids = [pair.prompt_ids(prompt) for prompt in prompts[start : start + config.prompts_per_step]]
        rollouts = sampler.generate(prompt_ids, tiny.TRAIN_SAMPLING, seed * 1_000_003 + step)
        learner.step(step, rollouts, teacher.hidden(rollouts))
        sampler.sync()


def trl_trainer(pair: Pair, config: LearnerConfig, prompts: list[str], seed: int) -> Any:
    """TRL's trainer with the same prompts, as chat-template text, and the same optimizer and learning rates."""
    from trl.trainer.distillation_config import DistillationConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.distillation_trainer import DistillationTrainer  # pyright: ignore[reportMissingImports]

    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    student = pair.student.module
    optimizer = make_optimizer(list(student.parameters()), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: learning_rate(k + 1, config) / config.lr)
    prompt_texts = [pair.decode(pair.prompt_ids(prompt), with_special=True) for prompt in prompts]
    return DistillationTrainer(
        model=student,
        teacher_model=pair.teacher.module,
        args=DistillationConfig(
            output_dir=tempfile.mkdtemp(prefix="benchmarks-e2e-"),
            max_steps=config.num_steps,
            per_device_train_batch_size=config.prompts_per_step,
            gradient_accumulation_steps=1,
            max_completion_length=tiny.MAX_RESPONSE_TOKENS,
            max_grad_norm=config.grad_clip,
            beta=1.0,  # KL(student || teacher)
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            logging_steps=max(1, config.num_steps // 2),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompt_texts}),
        processing_class=pair.tokenizer,
        optimizers=(optimizer, schedule),
    )
