"""What a run writes and how it is read back: metrics, evaluations, samples, result.json, W&B.

Owns every file name and metric name. Imports config and utils. Imported by run, learner, eval, estimate, launch, report
and probe.
"""
