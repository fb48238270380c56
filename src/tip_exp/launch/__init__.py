"""Commands `tip-exp` and `tip-plan`: command line in, finished run folders out; one child process per run.

Imports run, estimate, records, config, utils. Imported by nothing.
"""
