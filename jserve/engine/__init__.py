"""The parts that run each step: job, inbox, loop, pipeline, executor; the rest is in its rooms."""
