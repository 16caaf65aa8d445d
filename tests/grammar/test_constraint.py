"""Constraints as the scheduler asks for them, walked token by token with random choices."""

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from jserve.checkpoints.text_assets import byte_level_assets
from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec, Request, SamplingParams
from jserve.grammar.maker import ConstraintMaker
from jserve.grammar.source import GrammarKind, GrammarSource
from jserve.grammar.text import grammar_text
from jserve.scheduler.constraint import Constraint

EOS, VOCAB = 256, 300  # below EOS a token is a byte
THINK, DONE = tuple(b"<t>"), tuple(b"</t>")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 1},
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "kind": {"enum": ["one", "three"]}},
            "required": ["x", "kind"],
            "additionalProperties": False,
        },
        "more": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "tags", "inner"],
    "additionalProperties": False,
}


def source(value: Any, kind: GrammarKind = GrammarKind.JSON) -> str:
    return grammar_text(GrammarSource(kind=kind, value=value, field="x"), {})


def text(tokens: Sequence[int]) -> str:
    """Tokens above EOS are words, for example ` 257`."""
    parts = [bytes((token,)) if token < EOS else f" {token}".encode() for token in tokens]
    return b"".join(parts).decode(errors="replace")


def make(max_tokens: int = 1000, output: tuple[int, ...] = (), **fields: Any) -> Constraint:
    maker = ConstraintMaker(
        lambda: byte_level_assets(VOCAB, (EOS,)).tokenizer_json, vocab=VOCAB, eos_token_ids=(EOS,)
    )
    request = Request(
        id="a",
        prompt=(1,),
        sampling=SamplingParams(max_tokens=max_tokens),
        constraint=ConstraintSpec(**fields),
        output=output,
    )
    found = maker.make(request)
    assert found is not None
    return found


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    if mask is None:
        return list(range(VOCAB))
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:VOCAB]
    return np.nonzero(bits)[0].tolist()


def take(constraint: Constraint, tokens: Sequence[int]) -> None:
    for token in tokens:
        assert token in allowed(constraint)
        assert constraint.accept((token,)) == 1


def walk(constraint: Constraint, most: int, seed: int) -> list[int]:
    """Random tokens, a row of several at a time; those that do not stand are drawn again."""
    pick = random.Random(seed)
    tokens: list[int] = []
    retried = False
    while len(tokens) < most:
        choices = allowed(constraint)
        assert choices
        row = [pick.choice([c for c in choices if c < 128 or c == EOS] or choices)]
        if not retried and pick.random() < 0.3:  # the others are sampled without their masks
            row += pick.choices(range(VOCAB), k=3)
        stand = constraint.accept(row)
        tokens += row[:stand]
        assert stand or not retried, "a masked token did not stand twice"
        retried = not stand
        if EOS in tokens:
            return tokens[: tokens.index(EOS)]
    return tokens


def test_whatever_is_chosen_follows_the_schema() -> None:
    named = {name: it for name, it in SCHEMA["properties"].items() if name != "more"}
    schema = {**SCHEMA, "properties": named}
    num_ended = 0
    for seed in range(10):
        tokens = walk(make(3000, grammar=source(schema)), 3000, seed)
        if len(tokens) < 3000:
            num_ended += 1
            jsonschema.validate(json.loads(text(tokens)), schema)
    assert num_ended >= 5


@pytest.mark.parametrize("most", [64, 80, 120, 400])
@pytest.mark.parametrize("seed", range(6))
def test_a_text_that_has_to_fit_is_whole(seed: int, most: int) -> None:
    tokens = walk(make(most, grammar=source(SCHEMA), fit=True), most, seed)
    assert len(tokens) < most
    jsonschema.validate(json.loads(text(tokens)), SCHEMA)


def test_a_grammar_without_a_text_that_short_is_refused() -> None:
    with pytest.raises(RequestError, match="raise max_tokens, or leave fit out") as caught:
        make(30, grammar=source(SCHEMA), fit=True)
    assert caught.value.param == "max_tokens"


def test_masks_and_acceptance_agree() -> None:
    constraint = make(grammar=source("ab*c?", GrammarKind.REGEX))
    assert allowed(constraint) == [ord("a")]
    assert constraint.accept(b"b") == 0
    assert constraint.accept(b"abx") == 2
    assert allowed(constraint) == [ord("b"), ord("c"), EOS]
    assert constraint.accept(b"c") == 1
    assert allowed(constraint) == [EOS]
    assert constraint.accept((EOS, 5, 6)) == 3  # the end was ignored: anything may follow
    assert constraint.mask() is None


def test_reasoning_is_free_and_the_answer_is_bound() -> None:
    grammar = source(["yes", "no"], GrammarKind.CHOICE)
    constraint = make(grammar=grammar, reasoning_end=DONE)
    assert constraint.mask() is None
    assert constraint.accept(b"because</t>yellow") == len(b"because</t>")  # sampled without a mask
    assert allowed(constraint) == [ord("n"), ord("y")]
    take(constraint, [*b"yes", EOS])


def test_reasoning_may_begin_or_not() -> None:
    grammar = source(["yes", "no"], GrammarKind.CHOICE)
    spec = {"grammar": grammar, "reasoning_start": THINK, "reasoning_end": DONE}
    constraint = make(**spec)
    assert allowed(constraint) == sorted(map(ord, "ny<"))
    take(constraint, [*b"no", EOS])
    constraint = make(**spec)
    take(constraint, b"<t>hm</t>no")
    free = make(reasoning_start=THINK, reasoning_end=DONE, max_reasoning_tokens=3)
    assert free.accept(b"no reasoning at all") == 19


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_budget_ends_the_reasoning(most: int) -> None:
    constraint = make(reasoning_end=DONE, max_reasoning_tokens=most)
    assert constraint.accept(b"abcdefgh") == most
    take(constraint, DONE)
    assert constraint.mask() is None
    assert constraint.accept(b"abcdefgh") == 8


def test_a_budget_completes_an_end_that_has_begun() -> None:
    constraint = make(reasoning_end=DONE, max_reasoning_tokens=3)
    assert constraint.accept(b"a</") == 3
    assert allowed(constraint) == [ord("t")]
    take(constraint, b"t>")
    assert constraint.mask() is None


def test_the_model_may_not_end_before_an_answer_that_is_asked_for() -> None:
    grammar = source(["yes"], GrammarKind.CHOICE)
    constraint = make(grammar=grammar, reasoning_end=DONE)
    assert constraint.accept((*b"hm", EOS)) == 2
    take(constraint, [*DONE, *b"yes", EOS])
    assert make(reasoning_end=DONE).accept((*b"hm", EOS)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_reasoning_leaves_room_to_an_answer_that_has_to_fit(seed: int) -> None:
    constraint = make(100, grammar=source(SCHEMA), fit=True, reasoning_end=DONE)
    pick = random.Random(seed)
    tokens: list[int] = []
    while (mask := constraint.mask()) is None:  # endless reasoning
        row = pick.choices(range(97, 123), k=3)
        tokens += row[: constraint.accept(row)]
    assert mask is not None
    tokens += walk(constraint, 200, seed)
    assert len(tokens) < 100
    answer = text(tokens).partition("</t>")[2]
    jsonschema.validate(json.loads(answer), SCHEMA)


def test_bad_sequences_never_come() -> None:
    constraint = make(bad_sequences=(tuple(b"abc"), tuple(b"x"), tuple(b"bd")))
    assert ord("x") not in allowed(constraint)
    constraint = make(bad_sequences=(tuple(b"abc"), tuple(b"bd")))
    assert constraint.mask() is None
    assert constraint.accept(b"qabzz") == 3  # what follows was sampled without its mask
    assert sorted(set(range(VOCAB)) - set(allowed(constraint))) == [ord("c"), ord("d")]
    assert constraint.accept(b"c") == 0
    assert constraint.accept(b"ac") == 2
    assert constraint.mask() is None


def test_bad_sequences_beside_a_grammar() -> None:
    grammar = source("[a-c]+", GrammarKind.REGEX)
    constraint = make(grammar=grammar, bad_sequences=(tuple(b"ab"),))
    take(constraint, b"a")
    assert allowed(constraint) == [ord("a"), ord("c"), EOS]
    assert constraint.accept(b"d") == 0


def test_output_that_is_there_already_is_taken_token_by_token() -> None:
    grammar = source(["yes", "no"], GrammarKind.CHOICE)
    spec = {"grammar": grammar, "reasoning_end": DONE}
    assert allowed(make(output=tuple(b"hm</t>y"), **spec)) == [ord("e")]
    with pytest.raises(RequestError, match="breaks the constraint"):
        make(output=tuple(b"hm</t>x"), **spec)
