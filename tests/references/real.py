"""Logits of the real models in float64, transformers' own float32 error, and greedy texts."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from float64 import computing
from llama_cpp import Vocabulary
from templates import render
from transformers import PreTrainedModel
from weights import GEMMA3, SMOLLM2, Weights, gguf_file, load, metadata

ALICE = (Path(__file__).parent / "alice.txt").read_text()
SHORT = "The three primary colours are red, yellow and"
CODE = '''def binary_search(items: list[int], target: int) -> int:
    """Return the index of target in the sorted list items, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
'''
MIXED = (
    "Paris est la capitale de la France; Berlin ist die Hauptstadt von Deutschland. "
    "東京は日本の首都です。 Москва — столица России. 12 + 30 = 42, 7 × 8 = 56. 🙂\n\n"
    "| city | people |\n|---|---|\n| Tokyo | 37,400,000 |\n| Delhi |"
)
# The long prompt is longer than Gemma's sliding window of 512.
LOGIT_PROMPTS = {"short": SHORT, "code": CODE, "mixed": MIXED, "long": ALICE}
LONG_TOKENS = 700
POSITIONS, SAMPLED_IDS = 16, 384

GREEDY_TOKENS = 64
# Below this distance of the two best logits, rounding could choose another token.
MIN_MARGIN = 1e-2
RAW_PROMPTS = (
    "The capital of Italy is Rome. The capital of Spain is",
    "To make a cup of tea, first",
    "1, 1, 2, 3, 5, 8, 13,",
    "# Shopping list\n\n- apples\n- bread\n-",
    CODE,
    MIXED,
    ALICE[:1200].rstrip(),
)


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CHATS = (
    _chat(("user", "What is the capital of France?")),
    _chat(("user", "Write a haiku about the sea.")),
    _chat(("system", "You are a pirate."), ("user", "Who are you?")),
    _chat(
        ("user", "My name is Ada. Remember it."),
        ("assistant", "Of course, Ada."),
        ("user", "What is my name?"),
    ),
    _chat(("user", "Write a Python function that adds two numbers.")),
    _chat(("user", "Explain gravity to a child in two sentences.")),
    _chat(("user", "¿Cuál es la capital de España?")),
)


def make(folder: Path) -> None:
    """Writes <model>.npz for both models and smollm2_135m_greedy.json."""
    for weights in (SMOLLM2, GEMMA3):
        with gguf_file(weights) as path:
            vocabulary = Vocabulary(path)
            prompts = {
                name: vocabulary.tokenize(text, parse_special=False, add_special=True)
                for name, text in LOGIT_PROMPTS.items()
            }
            prompts["long"] = prompts["long"][:LONG_TOKENS]
            model = load(path, torch.float32)
            if weights is SMOLLM2:
                (folder / f"{weights.name}_greedy.json").write_text(
                    json.dumps(_greedy(model, vocabulary, metadata(path)), indent=1) + "\n"
                )
            _write_logits(folder / f"{weights.name}.npz", path, model, prompts, weights)


def _write_logits(
    out: Path,
    gguf: Path,
    model: PreTrainedModel,
    prompts: dict[str, list[int]],
    weights: Weights,
) -> None:
    sampled = np.random.default_rng(0).choice(model.config.vocab_size, SAMPLED_IDS, replace=False)
    arrays: dict[str, Any] = {"vocab_ids": np.sort(sampled).astype(np.int32)}
    positions = {
        name: np.unique(np.linspace(0, len(ids) - 1, POSITIONS).round()).astype(np.int32)
        for name, ids in prompts.items()
    }
    singles = {name: _rows(model, prompts[name], positions[name]) for name in prompts}
    del model
    gc.collect()
    exact_model = load(gguf, torch.float64)
    for name, token_ids in prompts.items():
        exact = _rows(exact_model, token_ids, positions[name])
        error = (singles[name].double() - exact).numpy()[:, arrays["vocab_ids"]]
        arrays |= {
            f"{name}_token_ids": np.array(token_ids, np.int32),
            f"{name}_positions": positions[name],
            f"{name}_logits_float64": exact.numpy()[:, arrays["vocab_ids"]],
            f"{name}_logsumexp_float64": exact.logsumexp(-1).numpy(),
            f"{name}_argmax": exact.argmax(-1).int().numpy(),
            f"{name}_float32_max_abs_error": np.abs(error).max(),
            f"{name}_float32_rms_error": np.sqrt(np.mean(error**2)),
        }
        print(weights.name, name, len(token_ids), np.abs(error).max(), error.std(), flush=True)
    _check_prose(exact_model, prompts["long"])
    np.savez_compressed(out, **arrays)


def _rows(model: PreTrainedModel, token_ids: list[int], positions: np.ndarray) -> torch.Tensor:
    """Logits of the prompt at some positions: [positions, vocab]."""
    with computing(model.dtype):
        ids = torch.tensor([token_ids])
        result = model(ids, logits_to_keep=torch.from_numpy(positions).long(), use_cache=False)
        return result.logits[0]


def _check_prose(model: PreTrainedModel, token_ids: list[int]) -> None:
    """A wrong conversion cannot predict English: the mean surprise would be near 10 nats."""
    with computing(model.dtype):
        logits = model(torch.tensor([token_ids[:256]]), use_cache=False).logits[0, :-1]
        surprise = torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[1:256]))
    if surprise > 3.5:
        raise AssertionError(f"mean surprise over English prose: {surprise:.2f} nats")


def _greedy(
    model: PreTrainedModel, vocabulary: Vocabulary, fields: dict[str, Any]
) -> list[dict[str, Any]]:
    prompts: list[tuple[Any, str]] = [(None, text) for text in RAW_PROMPTS]
    template = fields["tokenizer.chat_template"]
    prompts += [(chat, render(template, chat, add_generation_prompt=True)) for chat in CHATS]
    texts = []
    for messages, prompt in prompts:
        prompt_ids = vocabulary.tokenize(prompt, parse_special=messages is not None)
        token_ids, margin = _generate(model, prompt_ids)
        if margin < MIN_MARGIN:
            raise AssertionError(f"two tokens are {margin:.1e} apart after {prompt[-40:]!r}")
        stopped = token_ids[-1] == model.config.eos_token_id
        texts.append(
            {
                "messages": messages,
                "prompt": prompt,
                "prompt_ids": prompt_ids,
                "token_ids": token_ids,
                "text": vocabulary.detokenize(token_ids[:-1] if stopped else token_ids),
                "finish_reason": "stop" if stopped else "length",
                "smallest_margin": round(margin, 4),
            }
        )
        print(texts[-1]["finish_reason"], f"{margin:.4f}", repr(texts[-1]["text"]), flush=True)
    return texts


def _generate(model: PreTrainedModel, prompt_ids: list[int]) -> tuple[list[int], float]:
    """Greedy continuation, EOS included, and the smallest distance of the two best logits."""
    with computing(model.dtype):
        result = model.generate(
            torch.tensor([prompt_ids]),
            do_sample=False,
            max_new_tokens=GREEDY_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.cat(result.logits).topk(2).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    return result.sequences[0, len(prompt_ids) :].tolist(), margin
