"""From what became of each request to figures, plots and comparisons."""
