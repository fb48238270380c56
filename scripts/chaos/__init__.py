"""Runs that are disturbed at random, and programs that read and write run folders for long: see __main__.py."""
