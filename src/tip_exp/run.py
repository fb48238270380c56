"""ONE RUN, top to bottom: the student writes, the teacher reads, the selector chooses, the learner updates."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tip_exp.config.schema import RunConfig
from tip_exp.data import dataset, load
from tip_exp.data.contamination import overlap
from tip_exp.data.dataset import Dataset
from tip_exp.data.prompts import prompt_ids, with_tools
from tip_exp.envs.sampler import episode_metrics
from tip_exp.estimate.memory_check import check_memory
from tip_exp.eval.evaluate import Evaluations
from tip_exp.learner import checkpoint
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import check_logprob_mismatch, limits_for
from tip_exp.learner.samples import sample_rows
from tip_exp.models.load import check_context, load_pair
from tip_exp.models.pair import Pair
from tip_exp.models.privileged import behind
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.records.result import write_card, write_result
from tip_exp.records.writer import RunLogger, make_listeners
from tip_exp.rollout.backends import Backend, choose
from tip_exp.selector.selector import Quadrants, Selector
from tip_exp.types import Problem, Rollout, Sampling
from tip_exp.utils.errors import ConfigError

# Parameters. Two threads take twice one's time for the embedded pair: they wait for each other longer than they work.
TOO_SMALL_TO_SHARE = 10_000_000


def run(config: RunConfig, folder: RunFolder) -> None:
    """Train one student and leave its metrics, evaluations, checkpoint and, last, result.json in `folder`."""
    device = pick_device(config.device)
    seed_everything(config.seed)
    backend = choose(config.rollout, device, config.pair.student.dtype)
    print(backend)
    check_memory(config, device, backend.name)
    if config.mode == "eval":
        return evaluate_only(config, folder, backend, device)
    saved = checkpoint.newest(folder.checkpoints)
    check_context(config.pair, config.data.max_prompt_tokens, config.data.max_response_tokens)
    pair = load_pair(config.pair, device, student_from=saved.path if saved else None)
    torch.set_num_threads(pick_threads(config.num_threads, pair))
    train = load.load(config.data.train)
    problems, prompts = render_prompts(config, pair, train)
    meter = Meter(device)
    learner = Learner(pair, make_selector(config), config.learner, seed=config.seed, meter=meter, scratch=folder.root)
    if config.pair.teacher.placement != "resident":
        print(learner.teacher)
    start, last = saved.step if saved else 0, config.learner.num_steps
    order, sampling = dataset.ShuffledOrder(len(problems), config.seed), training_sampling(config)
    limits = limits_for(backend.dtype, config.pair.student.dtype, **config.rollout.max_logprob_mismatch.model_dump())
    with ExitStack() as stack:
        logger = stack.enter_context(
            RunLogger(folder, make_listeners(config, folder), resume_at=saved.step if saved else None)
        )
        evaluations = Evaluations(config.eval, pair, meter, logger, config.agent)
        datasets = describe_data(config, train, evaluations.loaded)
        write_first_prompts(folder, pair, training_prompts(pair, problems[0], prompts[0]) | evaluations.first_prompts())
        longest = max(config.data.max_prompt_tokens + config.data.max_response_tokens, evaluations.longest)
        metrics: dict[str, float] = {}
        if not saved and config.eval.teacher:  # before the student: a process holds one engine at a time
            with closing(backend.make(pair.teacher, pair, config.rollout, longest)) as of_teacher:
                metrics = evaluations(of_teacher, model="teacher", step=0)
        with meter.span("startup"):
            sampler = stack.enter_context(closing(backend.make(pair.student, pair, config.rollout, longest)))
        writer = with_tools(sampler, pair, train, config.agent)  # of tool tasks it writes whole episodes
        if saved:
            restore(saved, learner, backend)
        else:
            metrics = evaluations(sampler, model="student", step=0) | metrics
            logger.log(0, metrics | meter.drain_seconds() | meter.memory())
            print(learning_curve_point(0, metrics))
        progress = tqdm(range(start + 1, last + 1), initial=start, total=last, desc=config.name, mininterval=1.0)
        for step in progress:
            evaluating = step == last or (config.eval.every > 0 and step % config.eval.every == 0)
            meter.count_allocations = evaluating
            with meter.span("step"):
                chosen = order.batch(step, config.learner.prompts_per_step)
                with meter.span("rollout"):  # the student writes
                    rollouts = writer.generate([prompts[i] for i in chosen], sampling, step_seed(config.seed, step))
                show = config.logger.rollouts_per_sample if evaluating else 0
                reads = teacher_reads(pair, [problems[i] for i in chosen], rollouts)
                report = learner.step(
                    rollouts, step, show=show, teacher_reads=reads
                )  # teacher reads -> scores -> mask -> loss -> update
                check_logprob_mismatch(report.metrics, limits, step)
                with meter.span("sync"):  # on-policy again
                    sampler.sync()
            metrics = report.metrics | rollout_metrics(rollouts) | episode_metrics(writer)
            if evaluating:
                metrics |= evaluations(sampler, model="student", step=step)
                texts = [problems[i] for i in chosen for _ in range(sampling.samples)]
                logger.samples(step, sample_rows(pair, texts, rollouts, report, config.logger.rollouts_per_sample))
            metrics |= meter.drain_seconds() | meter.memory()
            metrics["rollout/tokens_per_s"] = metrics["select/response_tokens"] / metrics["time/rollout_s"]
            logger.log(step, metrics)
            progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
            if evaluating:
                progress.write(learning_curve_point(step, metrics))
            if step == last or step % config.learner.checkpoint_every == 0:
                state: dict[str, Any] = {"optimizer": learner.state_dict(), "random": checkpoint.random_states()}
                state["backend"] = backend.name
                checkpoint.save(folder.checkpoints, step, pair.student.module, pair.tokenizer, state)
        result = write_result(config, folder, datasets, asdict(backend))
        if trained := checkpoint.newest(folder.checkpoints):
            write_card(config, result, trained.path)
        logger.finish(result)


def evaluate_only(config: RunConfig, folder: RunFolder, backend: Backend, device: torch.device) -> None:
    """The benchmarks, of student and (if asked) teacher, as a run without steps: it lands in the same tables."""
    pair, meter = load_pair(config.pair, device), Meter(device)
    torch.set_num_threads(pick_threads(config.num_threads, pair))
    with RunLogger(folder, make_listeners(config, folder), resume_at=None) as logger:
        evaluations = Evaluations(config.eval, pair, meter, logger, config.agent)
        write_first_prompts(folder, pair, evaluations.first_prompts())
        metrics: dict[str, float] = {}
        for name, model in {"teacher": pair.teacher, "student": pair.student}.items():
            if name == "student" or config.eval.teacher:
                with closing(backend.make(model, pair, config.rollout, evaluations.longest)) as sampler:
                    metrics = evaluations(sampler, model=name, step=0) | metrics
        logger.log(0, metrics | meter.drain_seconds() | meter.memory())
        print(learning_curve_point(0, metrics))
        datasets = describe_data(config, None, evaluations.loaded)
        logger.finish(write_result(config, folder, datasets, asdict(backend)))


def write_first_prompts(folder: RunFolder, pair: Pair, prompts: dict[str, list[int]]) -> None:
    """The first prompt of each use, as the models get it: a wrong template is seen at a glance."""
    rendered = {use: pair.decode(ids, with_special=True) for use, ids in prompts.items()}
    folder.prompts.write_text(json.dumps(rendered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pick_threads(wanted: int | None, pair: Pair) -> int:
    """As many as are wanted; else torch's own choice, but one for models that are too small to share."""
    size = sum(parameter.numel() for parameter in pair.teacher.module.parameters())
    return wanted or (1 if size < TOO_SMALL_TO_SHARE else torch.get_num_threads())


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto")
    return torch.device(name)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def step_seed(seed: int, step: int) -> int:
    """The chance of a step's rollouts is a function of seed and step, so a resumed run samples the same."""
    return seed * 1_000_003 + step


def render_prompts(config: RunConfig, pair: Pair, train: Dataset) -> tuple[list[Problem], list[list[int]]]:
    """Training problems with their rendered prompts; prompts above the limit are left out."""
    rendered = list(zip(train.problems, prompt_ids(pair, train, config.agent), strict=True))
    fitting = [(problem, ids) for problem, ids in rendered if len(ids) <= config.data.max_prompt_tokens]
    if fitting and pair.privileged is not None:
        limit = pair.privileged.max_tokens
        fitting = [(problem, ids) for problem, ids in fitting if len(pair.privileged_ids(problem)) <= limit]
        if not fitting:
            raise ConfigError(
                f"pair.privileged.max_tokens={limit} leaves no problem: every privileged prompt is longer"
            )
    if not fitting:
        limit, shortest = config.data.max_prompt_tokens, min(len(ids) for _, ids in rendered)
        raise ConfigError(f"data.max_prompt_tokens={limit} leaves no prompt: the shortest has {shortest} tokens")
    return [problem for problem, _ in fitting], [ids for _, ids in fitting]


def training_prompts(pair: Pair, problem: Problem, prompt: list[int]) -> dict[str, list[int]]:
    """The first problem as the student reads it, and as the teacher does where that differs."""
    privileged = {} if pair.privileged is None else {"teacher": pair.privileged_ids(problem)}
    return {"training": prompt} | privileged


def teacher_reads(pair: Pair, problems: list[Problem], rollouts: list[Rollout]) -> list[Rollout] | None:
    """The rollouts (prompt-major) behind the privileged prompts of their problems; None where there are none."""
    if pair.privileged is None:
        return None
    samples = len(rollouts) // len(problems)
    prompts = [ids for problem in problems for ids in [pair.privileged_ids(problem)] * samples]
    return [behind(ids, rollout) for ids, rollout in zip(prompts, rollouts, strict=True)]


def restore(saved: checkpoint.Checkpoint, learner: Learner, backend: Backend) -> None:
    """Optimizer and random states of a checkpoint; its steps must have been sampled as the next ones will be."""
    state = saved.learner_state()
    if state["backend"] != backend.name:
        raise ConfigError(
            f"{saved.path} was sampled by {state['backend']}, but here rollouts come by {backend.name} "
            f"({backend.reason}); go on where {state['backend']} is available, or start a run under another name"
        )
    learner.load_state_dict(state["optimizer"])
    checkpoint.restore_random_states(state["random"])


def describe_data(config: RunConfig, train: Dataset | None, tests: dict[str, Dataset]) -> dict[str, Any]:
    """For result.json: what was read, and which test problems the training set holds as well."""
    suffix = getattr(config.data.train, "suffix", "")
    described: dict[str, Any] = {name: _read(loaded) for name, loaded in tests.items()}
    if train is not None:
        for name, test in tests.items():
            found = overlap(train.problems, test.problems, suffix)
            described[name] |= {"in_train_exact": found.exact, "in_train_13gram": found.ngram}
        described["train"] = _read(train)
    return described


def _read(loaded: Dataset) -> dict[str, Any]:
    return {"source": loaded.source, "sha256": loaded.sha256, "rows": len(loaded.problems)}


def make_selector(config: RunConfig) -> Selector:
    return Selector(
        **config.selector.model_dump(exclude={"label"}), quadrants=Quadrants(**config.quadrants.model_dump())
    )


def training_sampling(config: RunConfig) -> Sampling:
    rollout = config.rollout
    return Sampling(
        config.learner.samples_per_prompt,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        config.data.max_response_tokens,
    )


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    lengths = [rollout.num_response_tokens for rollout in rollouts]
    return {
        "rollout/response_len": sum(lengths) / len(lengths),
        "rollout/truncated_frac": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
    }


def learning_curve_point(step: int, metrics: dict[str, float]) -> str:
    """What a person watches: "step  20   word_sums/mean@4 50.3 %   word_sums/greedy 60.9 %   reverse KL 0.163"."""
    shown = [f"step {step:>5}"]
    accuracies = {name: value for name, value in metrics.items() if f"{name}_se" in metrics}
    shown += [f"{name.removeprefix('eval/')} {100 * value:.1f} %" for name, value in accuracies.items()]
    floors = {
        name: value
        for name, value in metrics.items()
        if name.startswith("eval/") and name.endswith("/no_tool_baseline")
    }
    shown += [f"{name.removeprefix('eval/')} {100 * value:.1f} %" for name, value in floors.items()]
    if "score/reverse_kl_mean" in metrics:
        shown.append(f"reverse KL {metrics['score/reverse_kl_mean']:.3f}")
    return "   ".join(shown)
