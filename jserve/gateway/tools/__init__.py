"""Tool calls in a model's text: one file per format; reads calls from text, and writes grammars."""
