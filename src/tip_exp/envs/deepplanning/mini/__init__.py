"""Generated travel tasks in the official file layout, for runs without the official database."""
