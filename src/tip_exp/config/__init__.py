"""A run's configuration: YAML in, a validated `RunConfig` or one `ConfigError` out.

Imports utils, and from selector.scores and selector.lookup the names of rules, statistics and settings. Every package
that reads a run's settings may import it.
"""
