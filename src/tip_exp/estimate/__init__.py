"""Memory and time before a run starts: a config in; GiB, seconds and a dry run on shapes out.

Imports models, losses, records, config, selector, types, utils. Imported by run and launch.
"""
