"""Analysis of scored rules: measure (measure), infer (statistics, scores), draw (charts) and present (page)."""
