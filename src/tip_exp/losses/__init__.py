"""Full-vocabulary statistics and masked losses: hidden states of both models in, statistics or gradients out.

Logits exist one tile at a time. Imports only the names of the statistics from selector; knows no config.
Imported by models, learner and estimate.
"""

from tip_exp.losses.fused import LossAndGrad, fused
from tip_exp.losses.materialized import materialized

__all__ = ["BACKENDS", "LossAndGrad", "fused", "materialized"]

BACKENDS = {"fused": fused, "materialized": materialized}
