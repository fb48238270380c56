"""`tip-exp influence` and `tip-exp advise`: what a few batches of a config say of its tokens and rules, untrained.

In: a RunConfig. Out: tables (CSV, Parquet, Markdown) and a page. Imports run, report, api, learner and what these
import. Imported by launch.
"""
