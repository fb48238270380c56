"""Tool-use environments and their episodes, behind the `Sampler` interface.

Tasks come in; `Rollout`s whose response mask excludes tool output go out, with scores. Imports grading, config (limits
of an episode), types, utils. Imported by run, eval and data.
"""
