"""Selectors in other trainers: a trainer object in, the same object with a masked loss out.

Imports api alone. Imported by users only.
"""
