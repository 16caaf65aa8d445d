"""The command `generate`: one prompt, streamed to the terminal by an engine in this process."""

from jserve.config import ServeConfig
from jserve.gateway.validation import SamplingFields
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
    llm = LLM(config)
    use_template = chat and llm.text.chat_template is not None
    given = llm.chat_prompt([{"role": "user", "content": prompt}]) if use_template else prompt
    sampling = SamplingFields(max_tokens=max_tokens, temperature=temperature, seed=seed)
    for text in llm.stream(given, sampling):
        print(text, end="", flush=True)
    print()
    return 0
