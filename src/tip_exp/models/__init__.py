"""The teacher/student pair: model paths in; checked and loaded models, heads and micro-batches out.

Imports losses (heads), config, types, utils. Imported by run, rollout, learner, estimate, data, eval, api and probe.
"""
