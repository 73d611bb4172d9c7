"""Methods side by side: many runs, one table."""
