"""Bound sequences on the tiny engine: the tokens that a mask at every step gives, in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jserve.cache.kv_cache import PrefixSharing
from jserve.core.request import Request, SamplingParams
from jserve.model.sampling.noise import token_keys, vocab_gumbel
from tests.engine.engine_harness import MOVING, TINY, Harness
from tests.model.sampling.sampling_reference import processed, truncated
from tests.scheduler.rules import Rule

pytestmark = pytest.mark.optimized

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "penalties": {"temperature": 0.9, "presence_penalty": 0.7, "repetition_penalty": 1.3},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.2, "top_p": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "bias": {"temperature": 0.0, "logit_bias": ((9, 2.0),), "bad_token_ids": (20, 30, 40)},
}
RULES: dict[str, Callable[[], Rule]] = {
    "one in three": lambda: Rule(TINY.vocab),
    "one in eleven": lambda: Rule(TINY.vocab, step=11),
    "free first": lambda: Rule(TINY.vocab, start=7),
    "free last": lambda: Rule(TINY.vocab, end=6),
}


@pytest.fixture(scope="module")
def harness(programs_folder: Path) -> Harness:
    return Harness(config=MOVING, cache_folder=programs_folder)


def requests() -> dict[str, tuple[Request, Callable[[], Rule]]]:
    found: dict[str, tuple[Request, Callable[[], Rule]]] = {}
    for i, (kind, sampling) in enumerate(KINDS.items()):
        for name, rule in RULES.items():
            prompt = np.random.default_rng(i).integers(2, TINY.vocab, 5 + 7 * i).tolist()
            params = SamplingParams(max_tokens=22, seed=i, ignore_eos=True, logprobs=2, **sampling)
            request = Request(id=f"{kind}, {name}", prompt=tuple(prompt), sampling=params, choice=i)
            found[request.id] = request, rule
    return found


def check_choices(harness: Harness, request: Request, rule: Rule, output: list[int]) -> None:
    """Checks each token of `output` against the best of the allowed ones, on dense logits."""
    logits = harness.dense_logits([*request.prompt, *output])
    sampling, start = request.sampling, len(request.prompt)
    for at, token in enumerate(output):
        x = processed(logits[start + at - 1], sampling, request.prompt, output[:at])
        if (mask := rule.mask()) is not None:
            allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
            x = np.where(allowed[: TINY.vocab] == 1, x, -np.inf)
        if sampling.temperature:
            keep = truncated(
                x, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
            )
            key = token_keys(
                jnp.array([[0, sampling.seed]], jnp.uint32),
                jnp.array([request.choice]),
                jnp.array([start + at]),
            )
            noise = np.asarray(vocab_gumbel(key, TINY.vocab))[0]
            x = np.where(keep, x / sampling.temperature + noise, -np.inf)
        best = np.sort(x)[-2:]
        assert best[1] - best[0] > 1e-4, "the case is too close to tell"
        assert token == int(np.argmax(x)), f"{request.id}: token {at}"
        assert rule.accept([token]) == 1


@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_are_those_of_a_float64_reference(harness: Harness, *, overlap: bool) -> None:
    asked = requests()
    outcomes = harness.run(
        [request for request, _ in asked.values()],
        arrivals=[i // 3 for i in range(len(asked))],
        overlap=overlap,
        constraints={name: rule() for name, (_, rule) in asked.items()},
    )
    for name, (request, rule) in asked.items():
        assert len(outcomes[name].tokens) == 22
        check_choices(harness, request, rule(), outcomes[name].tokens)


def run(harness: Harness, asked: Mapping[str, Any], **options: Any) -> dict[str, list[Any]]:
    outcomes = harness.run(
        [request for request, _ in asked.values()],
        constraints={name: rule() for name, (_, rule) in asked.items()},
        **options,
    )
    return {name: [it.tokens, it.logprobs] for name, it in outcomes.items()}


def test_company_preemption_and_prefixes_change_nothing(harness: Harness) -> None:
    asked = requests()
    together = run(harness, asked)
    for name in list(asked)[::5]:
        assert run(harness, {name: asked[name]})[name] == together[name]
    scarce = harness.scheduler_with(num_pages=14)
    assert run(harness, asked, scheduler=scarce) == together
    assert scarce.stats().num_preemptions > 0
    sharing = harness.scheduler_with(
        num_pages=60, sharing=PrefixSharing(generated=False, compare_tokens=True)
    )
    assert run(harness, asked, scheduler=sharing) == together
    assert run(harness, asked, scheduler=sharing) == together
    assert sharing.stats().prefix_hit_tokens > 0


def test_free_sequences_beside_bound_ones_are_as_without(harness: Harness) -> None:
    asked = requests()
    free = [
        Request(
            id=f"free {i}",
            prompt=(5, 6, 7 + i),
            sampling=SamplingParams(max_tokens=40, seed=i, ignore_eos=True),
        )
        for i in range(4)
    ]
    alone = harness.run(free)
    beside = harness.run(
        [*free, *(request for request, _ in asked.values())],
        constraints={name: rule() for name, (_, rule) in asked.items()},
    )
    for request in free:
        assert beside[request.id].tokens == alone[request.id].tokens
