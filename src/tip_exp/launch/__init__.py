"""Commands `tip-exp` and `tip-plan`: a command line in, finished run folders out; one child process per run.

Imports probe, api, run, data, estimate, report, records, config, utils; `run` only in the child
process. Imported by nothing.
"""
