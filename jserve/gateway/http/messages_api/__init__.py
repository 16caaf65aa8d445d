"""The Anthropic Messages API over the request plane: bodies in, messages and their events out."""
