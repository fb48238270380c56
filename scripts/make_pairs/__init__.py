"""Pretraining of the embedded pairs shipped in src/tip_exp/assets."""
