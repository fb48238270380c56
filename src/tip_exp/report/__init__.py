"""Command `tip-report`: run folders in; tables, figures, the HTML page and W&B workspaces out.

Imports records, config, selector, utils. Imported by launch and probe.
"""
