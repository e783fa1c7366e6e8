"""Building blocks of self-contained reports: a page, tables and plots; no script, no request, light and dark."""
