"""How long a step and a run take on a number of GPUs, from a config alone.

Lengths: responses average MEAN_RESPONSE of their limit, as measured for Qwen3-4B on DAPO's prompts, and are distributed
about exponentially, so that one of a step's responses reaches the limit and a response's mean context is its prompt and
its mean length. With N GPUs, P student and Q teacher parameters (in FLOPs those that a token uses, of experts some), b
the memory bandwidth, F the peak of bfloat16:

    longest response  tokens of the limit x (2 P / (0.8 b) + 1 ms): decoding reads all weights for each token
    queue             more such tokens, where a GPU has more responses than its KV cache holds at a time
    KV cache          bytes of the contexts of all a GPU's tokens / (0.8 b)
    teacher           2 Q FLOPs a token / (N 0.4 F)
    learner           (2 scoring + 2 forward + 4 backward + 2 recomputed if checkpointed) P FLOPs a token / (N 0.4 F)
    collectives       gathered layers and summed gradients of every micro-batch / (0.8 link), not overlapped
    engine            its weights to the host and back, and new weights: 3 x 2 P / host link

Attention products, elementwise work of the losses, prefill and data are left out: a few percent each. An evaluation
decodes its samples, which with eval.sequence_kl both models then read. For tool episodes a limit counts observations as
if they were sampled. Rollouts by transformers are timed as if vLLM sampled them, and rollout.staleness=1 as if nothing
overlapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import NODE_LINK, Card
from tip_exp.estimate.memory import ENGINE_WIDTH, RankMemory, num_problems
from tip_exp.estimate.shapes import ModelShape, shape_of
from tip_exp.utils.units import GIB

# Shares of the limits. 222,592 answers of Qwen3-4B (limit 8,192) in a public re-run of TIP's main setting average 1,960
# tokens; prompts of DAPO-Math with their template take about a tenth of their limit.
MEAN_RESPONSE, MEAN_PROMPT = 0.24, 0.1
FLOPS_SHARE, BANDWIDTH_SHARE = 0.4, 0.8  # of the peaks: assumed
# Per decoded token beside the reading of weights. Qwen3-4B in bfloat16 on an RTX 4090 is reported at 10.3 to 10.5 ms
# per token; 8.0 GB / (0.8 x 1.008 TB/s) + 1 ms = 11.0 ms.
DECODE_OVERHEAD_S = 1e-3


@dataclass(frozen=True, slots=True)
class RunTime:
    """Seconds of one step by part, of one evaluation, and of the whole run."""

    step: dict[str, float]
    evaluation_s: float
    run_s: float

    @property
    def step_s(self) -> float:
        return sum(self.step.values())


def run_time(config: RunConfig, card: Card, ranks: int) -> RunTime:
    """The forecast for `ranks` cards; it does not ask whether the run fits them."""
    learner, evaluation = config.learner, config.eval
    step = step_seconds(config, card, ranks) if config.mode == "train" else {}
    evaluation_s = evaluation_seconds(config, card, ranks)
    steps = learner.num_steps if step else 0
    run_s = steps * sum(step.values()) + num_evaluations(steps, evaluation.every) * evaluation_s
    if evaluation.teacher and config.mode != "teacher":  # its evaluation is a run of its own
        run_s += evaluation_seconds(config.model_copy(update={"mode": "teacher"}), card, ranks)
    return RunTime(step, evaluation_s, run_s)


def num_evaluations(num_steps: int, every: int) -> int:
    """Evaluations of the student: before step 1, every `every` steps and after the last; 1 in a run without steps."""
    return 1 + (0 if num_steps == 0 else math.ceil(num_steps / every) if every else 1)


def step_seconds(config: RunConfig, card: Card, ranks: int) -> dict[str, float]:
    """Seconds of a training step by part."""
    memory, learner, data = RankMemory(config, card.gib, ranks), config.learner, config.data
    teacher, student = memory.teacher, memory.student
    engine_gib = max(memory.engine_gib())
    sampled = math.ceil(learner.prompts_per_step / ranks) * learner.samples_per_prompt  # a rank samples whole prompts
    parts = decode_seconds(memory, card, student, engine_gib, sampled, data.max_response_tokens)
    prompt, response = MEAN_PROMPT * data.max_prompt_tokens, MEAN_RESPONSE * data.max_response_tokens
    length = prompt + response
    if config.agent is not None and config.agent.max_train_tokens is not None:
        length = min(length, config.agent.max_train_tokens)
    tokens, rate = memory.rollouts * length, FLOPS_SHARE * card.flops
    parts["teacher"] = 2 * teacher.active * tokens / rate
    backward = 4 if config.pair.student.lora is None else 2  # adapters need no gradient of the weights
    passes = 2 + 2 + backward + (2 if learner.activation_checkpointing else 0)
    parts["learner"] = passes * student.active * tokens / rate
    batches = math.ceil(tokens / learner.micro_batch_tokens)
    link = BANDWIDTH_SHARE * (card.link if config.nodes == 1 or learner.replicas >= config.nodes else NODE_LINK)
    exchanged = 0.0
    if memory.ranks > 1:
        # The student's layers for scoring, forward and backward passes; their gradients; the teacher's layers.
        layers = student.layers * student.layer * (3 * memory.width + 4)
        layers += teacher.layers * teacher.layer * memory.teacher_width
        exchanged = batches * layers + student.vocabulary * (memory.width + 4) + teacher.head * memory.teacher_width
        exchanged *= (memory.shards - 1) / memory.shards / link
    if memory.offload:
        exchanged += batches * teacher.parameters * memory.teacher_width / memory.shards / card.host_link
    parts["collectives"] = exchanged
    parts["engine"] = 3 * ENGINE_WIDTH * student.parameters / card.host_link if memory.backend == "vllm" else 0.0
    return parts


def decode_seconds(
    memory: RankMemory, card: Card, model: ModelShape, engine_gib: float, responses: float, max_tokens: int
) -> dict[str, float]:
    """Seconds for one rank's engine of `engine_gib` to sample `responses` answers of at most `max_tokens`."""
    context = MEAN_PROMPT * memory.config.data.max_prompt_tokens + MEAN_RESPONSE * max_tokens
    cached = model.cached * ENGINE_WIDTH
    free = engine_gib * GIB - model.parameters * ENGINE_WIDTH
    at_once = max(1.0, min(memory.config.rollout.batch_size, free / (cached * context)))
    bandwidth = BANDWIDTH_SHARE * card.bandwidth
    per_token = ENGINE_WIDTH * model.parameters / bandwidth + DECODE_OVERHEAD_S
    sampled = responses * MEAN_RESPONSE * max_tokens
    waiting = max(0.0, sampled / at_once - MEAN_RESPONSE * max_tokens)  # until the last answer starts
    return {
        "longest response": max_tokens * per_token,
        "queue": waiting * per_token,
        "KV cache": sampled * context * cached / bandwidth,
    }


def evaluation_seconds(config: RunConfig, card: Card, ranks: int) -> float:
    """Seconds of one evaluation of the model that a run samples; 0 for a teacher that no engine on one card holds."""
    evaluation, memory = config.eval, RankMemory(config, card.gib, ranks)
    responses = num_problems(evaluation.model_dump()) * (evaluation.samples + evaluation.greedy) / ranks
    given, needed = memory.engine_gib()
    if config.mode == "teacher" and needed > given:
        return 0.0
    times = decode_seconds(memory, card, memory.sampled, max(given, needed), responses, evaluation.max_tokens)
    seconds = sum(times.values())
    if evaluation.measures_kl and config.mode != "teacher":  # both models read the sampled responses
        length = MEAN_PROMPT * config.data.max_prompt_tokens + MEAN_RESPONSE * evaluation.max_tokens
        tokens = num_problems(evaluation.model_dump()) * evaluation.samples / ranks * length
        seconds += 2 * (memory.teacher.active + memory.student.active) * tokens / (FLOPS_SHARE * card.flops)
    return seconds


def flops(config: dict[str, Any]) -> float:
    """Floating-point operations of a run: 2 P per token forward, 4 P backward; sampling counts as a forward.

    A training does not evaluate its teacher: that is a run of its own, of mode=teacher.
    """
    learner, evaluation, pair, data = config["learner"], config["eval"], config["pair"], config["data"]
    models = pair["teacher"], pair["student"]
    teacher, student = (shape_of(model["path"], model["revision"]).active for model in models)
    length = MEAN_PROMPT * data["max_prompt_tokens"] + MEAN_RESPONSE * data["max_response_tokens"]
    num_steps = learner["num_steps"] if config["mode"] == "train" else 0
    rollouts = num_steps * learner["prompts_per_step"] * learner["samples_per_prompt"]
    training = rollouts * length * (2 * teacher + (2 + 6) * student)
    evaluated = teacher if config["mode"] == "teacher" else student
    samples = num_problems(evaluation) * (evaluation["samples"] + evaluation["greedy"])
    per_evaluation = samples * MEAN_RESPONSE * evaluation["max_tokens"] * 2 * evaluated
    if evaluation["sequence_kl"] and config["mode"] != "teacher":  # both models read the sampled responses
        length = MEAN_PROMPT * data["max_prompt_tokens"] + MEAN_RESPONSE * evaluation["max_tokens"]
        per_evaluation += num_problems(evaluation) * evaluation["samples"] * length * 2 * (teacher + student)
    return training + num_evaluations(num_steps, evaluation["every"]) * per_evaluation
