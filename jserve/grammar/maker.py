"""Constraints of requests, from what travels with them."""

import threading
from collections.abc import Callable

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec, Request
from jserve.grammar.bad_sequences import BadSequences
from jserve.grammar.compiler import GrammarCompiler
from jserve.grammar.constraint import GrammarConstraint
from jserve.grammar.reasoning import ReasoningConstraint
from jserve.grammar.room import Room

Constraint = GrammarConstraint | ReasoningConstraint | BadSequences


class ConstraintMaker:
    """Makes the constraints of an engine's sequences. Safe to use from several threads.

    The tokenizer is read when the first grammar comes: most engines never see one.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], *, vocab: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab, self._eos = vocab, eos_token_ids
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def make(self, request: Request) -> Constraint | None:
        """What binds the output of `request`; it has taken the output so far.

        None if nothing is bound. It takes milliseconds or more, most of them without the GIL.
        Raises RequestError for a wrong grammar, or an output that it does not allow, and
        ConfigError for a tokenizer without grammars.
        """
        spec = request.constraint
        bound = None if spec is None else self._make(spec, request.sampling.max_tokens)
        # One by one: each was sampled with the mask that belongs to it.
        if bound is not None and not all(bound.accept((token,)) for token in request.output):
            raise RequestError("output: breaks the constraint of the request", param="output")
        return bound

    def _make(self, spec: ConstraintSpec, max_tokens: int) -> Constraint | None:
        grammar = None
        if spec.grammar:
            compiler = self._grammars()
            matcher = compiler.matcher(spec.grammar)
            room = Room(compiler.closing, matcher, max_tokens) if spec.fit else None
            grammar = GrammarConstraint(matcher, self._vocab, self._eos, room)
        bound = grammar
        if spec.reasoning_end:
            bound = ReasoningConstraint(spec, grammar, vocab=self._vocab, eos_token_ids=self._eos)
        if spec.bad_sequences:
            return BadSequences(spec.bad_sequences, bound, self._vocab)
        return bound

    def _grammars(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer_json(), vocab=self._vocab, eos_token_ids=self._eos
                )
            return self._compiler
