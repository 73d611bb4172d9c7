"""A run's rows in the tools that people watch runs with."""
