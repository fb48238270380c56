"""`tip-exp influence` and `tip-exp advise`: what a few batches of a config say of its tokens and rules, untrained.

In: a RunConfig. Out: tables (CSV, Parquet, Markdown) and a page. Imports api, run, report, learner, losses, models,
records, config, selector, types, utils. Imported by launch.
"""
