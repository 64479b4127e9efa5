"""A grid of experiments: its cells (cells), how they run (running), what git keeps of them (record)."""
