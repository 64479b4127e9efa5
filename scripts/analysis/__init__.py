"""Analysis of scored rules: measurements, comparisons with their statistics, charts, and the page of the report."""
