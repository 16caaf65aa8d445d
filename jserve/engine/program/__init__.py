"""The step program: all that is traced and compiled, and the cache of compiled programs."""
