"""Attention over paged KV memory for a ragged batch, with the KV write."""
