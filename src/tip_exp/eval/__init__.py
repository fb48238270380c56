"""Evaluation: a sampler and benchmarks in, graded rows and accuracy metrics out.

Imports data, envs, grading, records, types. Imported by run.
"""
