"""Tables of results: read (published, results), lay out (layout, compare), write (render, page)."""
