"""What a run's records say: statistics, tables, a page with plots, and one run beside another."""
