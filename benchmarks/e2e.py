"""`tip-bench e2e`: whole trainings of the embedded pair by TRL's DistillationTrainer and by ours, from equal settings.

Prompts, their order, steps, batch, learning rate of every step, AdamW, clipping, reverse KL and transformers' sampling
are the same; the chance of the samples is not. TRL's gradient checkpointing and bfloat16, on by default, are off. Each
training has a process of its own; cost is from loaded models to the last update, accuracy is measured after.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import measuring, tiny
from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.learner import Learner, learning_rate
from tip_exp.learner.teacher import Teacher
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter

COLUMNS = (
    "implementation",
    "retention",
    "seed",
    "steps",
    "rollouts",
    "wall_s",
    "cpu_s",
    "peak_extra_mib",
    "greedy",
    "sampled",
    "sampled_se",
)
TRAININGS = (("trl", 1.0), ("ours", 1.0), ("ours", 0.2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="4 steps of 16 rollouts: that it works, not how well")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rollouts", type=int, default=64, help="a step's; one a prompt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/e2e.csv"))


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.steps, arguments.rollouts, arguments.seeds = 4, 16, [0]
    trainings = TRAININGS
    if absent := measuring.missing(["trl"]):
        measuring.tell_missing(absent, "its rows are left out")
        trainings = tuple(one for one in TRAININGS if one[0] != "trl")
    rows: list[dict[str, object]] = []
    for seed in arguments.seeds:
        for implementation, retention in trainings:
            rows.append(
                measuring.in_child(
                    measure,
                    implementation,
                    retention,
                    seed,
                    arguments.steps,
                    arguments.rollouts,
                    arguments.threads,
                    threads=arguments.threads,
                )
            )
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            measuring.write_csv(rows, COLUMNS, arguments.out)
    print(f"{len(rows)} rows in {arguments.out}")


def measure(
    implementation: str, retention: float, seed: int, steps: int, rollouts: int, threads: int
) -> dict[str, object]:
    """One training and what it reached."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    pair = tiny.load()
    settings = tiny.learner_settings(num_steps=steps, prompts_per_step=rollouts)
    prompts = tiny.prompts(steps * rollouts, seed)
    if implementation == "trl":
        trainer = trl_trainer(pair, settings, prompts, seed)
        cost, _ = measuring.cost_of(trainer.train)
        pair.student.module.eval()
    else:
        cost, _ = measuring.cost_of(lambda: train(pair, settings, prompts, retention, seed))
    found = tiny.accuracy(pair)
    measured = {"wall_s": round(cost.wall_s, 2), "cpu_s": round(cost.cpu_s, 2)}
    measured["peak_extra_mib"] = round(cost.peak_extra_mib, 1)
    reached = {name: round(value, 4) for name, value in asdict(found).items()}
    size = {"seed": seed, "steps": steps, "rollouts": rollouts}
    return {"implementation": implementation, "retention": retention, **size, **measured, **reached}


def train(pair: Pair, settings: LearnerConfig, prompts: list[str], retention: float, seed: int) -> None:
    """The loop of a run, without its evaluations, files and logs."""
    sampler = tiny.sampler_of(pair)
    learner = Learner(pair, tiny.selector(retention), settings, seed=seed, meter=Meter(torch.device("cpu")))
    teacher = Teacher(pair, settings, learner.meter)
    for step in range(1, settings.num_steps + 1):
        start = (step - 1) * settings.prompts_per_step
        ids = [pair.prompt_ids(prompt) for prompt in prompts[start : start + settings.prompts_per_step]]
        rollouts = sampler.generate(ids, tiny.training_sampling(), seed * 1_000_003 + step)
        learner.step(step, rollouts, teacher.hidden(rollouts))
        sampler.sync()


def trl_trainer(pair: Pair, settings: LearnerConfig, prompts: list[str], seed: int) -> Any:
    """TRL's trainer with the same prompts, rendered, and the same optimizer and learning rates."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl.trainer.distillation_config import DistillationConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.distillation_trainer import DistillationTrainer  # pyright: ignore[reportMissingImports]

    student = pair.student.module
    beta1, beta2 = settings.betas
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, betas=(beta1, beta2), weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: learning_rate(k + 1, settings) / settings.lr)
    rendered = [pair.decode(pair.prompt_ids(prompt), with_special=True) for prompt in prompts]
    return DistillationTrainer(
        model=student,
        teacher_model=pair.teacher.module,
        args=DistillationConfig(
            output_dir=tempfile.mkdtemp(prefix="tip-bench-"),
            max_steps=settings.num_steps,
            per_device_train_batch_size=settings.prompts_per_step,
            gradient_accumulation_steps=1,
            max_completion_length=tiny.MAX_RESPONSE_TOKENS,
            max_grad_norm=settings.grad_clip,
            beta=1.0,  # KL(student || teacher)
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            logging_steps=max(1, settings.num_steps // 2),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": rendered}),
        processing_class=pair.tokenizer,
        optimizers=(optimizer, schedule),
    )
