"""Tool-use environments: token-level multi-turn episodes behind the `Sampler` interface, with their scores.

Tasks come in, `Rollout`s with a response mask that excludes tool output go out. Imports grading, types, utils.
Imported by run, eval and data.
"""
