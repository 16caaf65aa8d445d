"""Exact, per-slot sampling on the device: pure functions for the engine's step program."""
