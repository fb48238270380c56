"""Paths, files, units and errors. Imports nothing of tip_exp; imported by any package."""
