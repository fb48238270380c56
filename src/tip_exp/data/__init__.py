"""Data sets: a dataset config in, `Problem`s with known answers and their provenance out.

Imports envs (tool tasks), types, utils. Imported by run and eval.
"""
