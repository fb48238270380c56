"""Programs that make model pairs: the two embedded ones in src/tip_exp/assets, and SmolLM2-135M from a package."""
