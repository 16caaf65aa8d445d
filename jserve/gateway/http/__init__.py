"""The HTTP front end: OpenAI-compatible routes, server-sent events, probes and metrics."""
