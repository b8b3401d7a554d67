"""Reports on result files: tables, learning curves, and a page that compares runs."""
