"""Result tables: the paper's, alone and next to ours (published), ours (results, ours), and their text (layout)."""
