"""Tasks of our own for lm-evaluation-harness: a YAML file each, and the functions it names."""
