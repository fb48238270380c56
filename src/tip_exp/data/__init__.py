"""Data sets: a dataset config in, `Problem`s with reference answers and their provenance out.

Imports models and envs (prompts and tool tasks), grading (answers in boxes), config, types,
utils. Imported by launch, run and eval.
"""
