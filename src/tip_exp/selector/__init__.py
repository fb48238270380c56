"""Token selection: per-token statistics in, a boolean mask (and weights) over the step's response tokens out.

Imports nothing of tip_exp. Imported by losses and config (names only), learner, estimate, report, run, api and probe.
"""
