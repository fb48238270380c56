"""One call of a rule on random tokens, so that a broken one is refused before models load."""

from __future__ import annotations

from typing import Any

import torch

from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Quadrants, Selector, Tokens

ROLLOUTS, LENGTH, VOCAB = 4, 16, 40


def trial_error(settings: dict[str, Any], quadrants: dict[str, float]) -> str:
    """What the Selector of these settings raises on the statistics of random distributions; "" if it selects."""
    selector = Selector(**settings, quadrants=Quadrants(**quadrants))
    rollout = torch.arange(ROLLOUTS).repeat_interleave(LENGTH)
    tokens = Tokens(rollout, rollout // 2, torch.arange(LENGTH).repeat(ROLLOUTS))
    try:
        selector(_statistics(len(tokens)), tokens, torch.Generator().manual_seed(0))
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return ""


def _statistics(num_tokens: int) -> dict[str, torch.Tensor]:
    """Of two random distributions for each token, so that they fit each other as those of models do."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(num_tokens, VOCAB, generator=generator)
    teacher = student + torch.randn(num_tokens, VOCAB, generator=generator)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_mean = ((p + q) / 2).log()
    sampled = torch.multinomial(p, 1, generator=generator)
    reverse_kl = (p * (log_p - log_q)).sum(-1)
    top = [values.topk(10).indices for values in (p, q)]
    values = {
        "entropy": -(p * log_p).sum(-1),
        "teacher_entropy": -(q * log_q).sum(-1),
        "reverse_kl": reverse_kl,
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "grad_norm": (p * (log_p - log_q - reverse_kl[:, None])).norm(dim=-1),
        "jsd": (p * (log_p - log_mean) + q * (log_q - log_mean)).sum(-1) / 2,
        "student_logprob": log_p.gather(-1, sampled)[:, 0],
        "teacher_logprob": log_q.gather(-1, sampled)[:, 0],
        "topk_overlap": (top[0][:, :, None] == top[1][:, None]).any(-1).float().mean(-1),
        "teacher_mass_topk": q.gather(-1, p.topk(16).indices).sum(-1),
        "teacher_rank": (q > q.gather(-1, p.argmax(-1, keepdim=True))).sum(-1).float(),
        "ier": torch.rand(num_tokens, generator=generator),
    }
    assert values.keys() == set(STATISTICS)
    return values
