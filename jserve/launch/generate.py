"""The command `generate`: one prompt, streamed to the terminal by an engine in this process."""

import sys

from jserve.checkpoints.progress import FileProgress
from jserve.config import ServeConfig
from jserve.gateway.validation import SamplingFields
from jserve.launch.console import Console
from jserve.offline import LLM


def generate(
    config: ServeConfig,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    chat: bool,
) -> int:
    """Prints the answer as it comes; returns the exit code."""
    console = Console(sys.stderr)  # the answer alone goes to standard output
    llm = LLM(
        config,
        on_files=FileProgress("model files", console.say),
        on_phase=lambda phase, detail: console.say(f"{phase} {detail}"),
    )
    use_template = chat and llm.text.chat_template is not None
    given = llm.chat_prompt([{"role": "user", "content": prompt}]) if use_template else prompt
    sampling = SamplingFields(max_tokens=max_tokens, temperature=temperature, seed=seed)
    for text in llm.stream(given, sampling):
        print(text, end="", flush=True)
    print()
    return 0
