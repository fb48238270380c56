"""The library behind `tip_exp.score`, `select`, `loss` and `statistics`, and the command `tip-exp score`.

Imports learner (influence), models, losses, config, selector, types, utils. Imported by tip_exp itself, launch, probe
and integrations.
"""
