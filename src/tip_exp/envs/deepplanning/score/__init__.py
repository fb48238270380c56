"""The official scoring rules: a plan and its task's tables in, a verdict per check out."""
