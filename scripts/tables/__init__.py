"""Result tables: the paper's, alone and next to ours (published), ours (results), and their text (layout)."""
