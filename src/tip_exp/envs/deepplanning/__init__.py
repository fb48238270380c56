"""DeepPlanning's travel half: its tasks, its tools, a reader for its plans and its rules for scoring them."""
