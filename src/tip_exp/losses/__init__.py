"""Full-vocabulary statistics and masked losses: both models' hidden states in, statistics or gradients out.

Logits exist one tile at a time. Imports only the names of the statistics from selector; does not depend on config.
Imported by models, learner, estimate, api and probe.
"""

from tip_exp.losses.masked_loss import LossAndGrad, fused, materialized

__all__ = ["BACKENDS", "LossAndGrad", "fused", "materialized"]

BACKENDS = {"fused": fused, "materialized": materialized}  # equal up to rounding; they differ in memory and time
