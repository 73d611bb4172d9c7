"""A checkpoint as torch sees it. Scorer and learner both compute log-probabilities with this code, and nothing else does."""
