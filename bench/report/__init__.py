"""These files show the results of a run as tables, plots and a page, and compare two runs."""
