"""Tool-using episodes: environments, the loop that plays them in batches, and what comes out of it."""
