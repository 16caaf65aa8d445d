"""Generates for a list of prompts in this process, without a server."""

import sys

from jserve import config
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM

llm = LLM(config.load(sys.argv[1] if len(sys.argv) > 1 else "configs/smollm2_135m.py"))
prompts = ["1, 2, 3, 4,", "2, 4, 6, 8,", "10, 20, 30, 40,"]
for completion in llm.generate(prompts, SamplingFields(temperature=0, max_tokens=16)):
    print(f"{completion.prompt!r} -> {completion.text!r}")
