"""What records say: medians with intervals, tables, one HTML page, and the comparison of two runs."""
