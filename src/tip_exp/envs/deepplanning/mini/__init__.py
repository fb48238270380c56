"""A small generated travel world in the official file layout, for runs without the official database."""
