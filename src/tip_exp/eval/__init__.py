"""Evaluation: a sampler and benchmarks in, graded rows and accuracy metrics out.

Imports data, models, envs, grading, records, config, types, utils. Imported by run.
"""
