"""Reasoning in a model's text: which part of an answer is thought, and which is for the user."""
