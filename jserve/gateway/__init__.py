"""The request plane: HTTP and gRPC front ends, tokenizer, detokenizer, stop strings. No JAX."""
