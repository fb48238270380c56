"""A run's configuration: YAML in, a validated `RunConfig` or one `ConfigError` out.

Imports utils, and from selector only the names of the rules. Imported by every package that reads a run's settings.
"""
