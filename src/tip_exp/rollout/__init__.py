"""Student rollouts: prompt ids in; `Rollout`s (ids, response mask, log-probs) out; backends hf and vllm.

Imports models, config, types, utils. Imported by run.
"""
