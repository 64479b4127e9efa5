"""Grids of training runs: which runs there are (runs) and how each is executed (running)."""
