"""Generates for a list of prompts in this process, without a server."""

import sys

from jserve import config
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM

llm = LLM(config.load(sys.argv[1] if len(sys.argv) > 1 else "configs/smollm2_135m.py"))
prompts = ["The capital of France is", "Water boils at", "The first man on the moon was"]
for completion in llm.generate(prompts, SamplingFields(temperature=0, max_tokens=16)):
    print(f"{completion.prompt!r} -> {completion.text!r}")
