"""The Ollama API over the request plane: bodies in, objects and lines of JSON out."""
