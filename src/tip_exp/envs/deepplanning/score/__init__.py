"""The official scoring rules: a structured plan and its task's tables in, verdicts per check out."""
