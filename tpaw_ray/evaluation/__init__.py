"""How good a checkpoint is on held-out prompts."""
