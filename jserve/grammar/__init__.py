"""Grammars that bind what a model writes: from the forms clients send to masks of token ids."""
