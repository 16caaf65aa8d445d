"""SmolLM2's greedy texts from `LLM` are transformers', token by token."""

import json
from pathlib import Path
from typing import Any

import pytest

from jserve.config import load
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM

# `make test` asks the command line, an `LLM` too, and a server for the same texts (tests/e2e).
pytestmark = [pytest.mark.network, pytest.mark.sweep]

ROOT = Path(__file__).parents[1]
CASES: list[dict[str, Any]] = json.loads(
    (ROOT / "tests/fixtures/weights/smollm2_135m_greedy.json").read_text()
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """An LLM with fewer and other programs than a server's: the answers are the same."""
    sizes = ("num_slots=16", "mixed_tokens=96", "decode_rows=16", "num_pages=512")
    config = str(ROOT / "configs" / "smollm2_135m.py")
    return LLM(load(config, [f"engine.{size}" for size in sizes]))


def test_prompts_become_the_same_token_ids(llm: LLM) -> None:
    for case in CASES:
        messages, prompt = case["messages"], case["prompt"]
        ids = llm.chat_prompt(messages) if messages else llm.text.tokenizer.encode(prompt)
        assert list(ids) == case["prompt_ids"], prompt


def test_greedy(llm: LLM) -> None:
    fields = SamplingFields(temperature=0, max_tokens=64)
    completions = llm.generate([case["prompt_ids"] for case in CASES], fields, use_tqdm=False)
    for case, completion in zip(CASES, completions, strict=True):
        assert list(completion.token_ids) == case["token_ids"], case["prompt"]
        assert completion.text == case["text"]
        assert completion.finish_reason.value == case["finish_reason"]
