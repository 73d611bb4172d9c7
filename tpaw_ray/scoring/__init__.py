"""Reference log-probabilities of frozen players: one number per (player, response), computed once."""
