"""Limits that both ends of a connection must agree on."""

# Prompt log-probabilities of a long prompt are the largest message: 21 entries per token.
MAX_SESSION_MESSAGE_BYTES = 512 << 20
