"""A run's checkpoint for others: a Hugging Face directory with a model card."""
