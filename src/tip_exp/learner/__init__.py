"""One optimizer step: rollouts and teacher hidden states in, updated student and step metrics out.

Statistics, selection, masked loss, AdamW; also checkpoints, the teacher's hidden states and process groups.
Imports models, losses, selector, records, config, types, utils. Imported by run, api and probe.
"""
