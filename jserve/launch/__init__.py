"""Starts a role or a command: the only reader of flags and environment."""
