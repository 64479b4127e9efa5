"""The report of a run: measured (measure), drawn (svg, charts, pictures), put on a page (sections, page)."""
