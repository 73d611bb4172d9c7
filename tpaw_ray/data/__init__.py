"""Rows as Arrow sees them: the user's files become conversations, conversations become token ids. No tensors here."""
