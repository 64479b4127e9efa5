"""Result tables: published (published), ours (results, ours), both (compare), as text (layout), in git (generated)."""
