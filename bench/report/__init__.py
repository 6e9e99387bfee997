"""What came of a run: tables, plots, a page, and a comparison of two runs."""
