"""The OpenAI Responses API: items in, items out, and responses that are kept for later ones."""
