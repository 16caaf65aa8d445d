"""Bodies of POST requests → frozen requests; large ones are read in another process.

Parsing, checking and freeing megabytes of JSON holds the interpreter for seconds, in a thread as
well. A body of 64 kB takes a few milliseconds.
"""

import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from jserve.core.errors import Overloaded, RequestError
from jserve.core.request import EngineInfo
from jserve.gateway.cache_salts import given_salt
from jserve.gateway.config import UnknownFields
from jserve.gateway.conversation import Conversation
from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.http.body import parse_object, read_body
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.fields import MAX_IGNORED
from jserve.gateway.http.messages_api.request import (
    MessagesRequest,
    parse_count,
    parse_messages,
)
from jserve.gateway.http.ollama.request import (
    OllamaRequest,
    ShowRequest,
    parse_ollama_chat,
    parse_ollama_generate,
    parse_show,
)
from jserve.gateway.http.openai_request import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from jserve.gateway.http.responses.request import ResponseRequest, parse_response
from jserve.gateway.http.token_request import (
    DetokenizeRequest,
    TokenizeRequest,
    parse_detokenize,
    parse_tokenize,
)
from jserve.gateway.job_child import Handler
from jserve.gateway.job_process import JobLimits, JobProcesses, JobStopped
from jserve.gateway.messages import check_messages
from jserve.gateway.prompts import Truncation
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.turns import LoopTurns
from jserve.gateway.validation import (
    SamplingFields,
    check_id_lists,
    check_prompt,
    check_stop,
    resolve_sampling,
    token_ids,
)

_LARGE_BYTES = 64 << 10
_LIMITS = JobLimits(cpu_s=15.0, memory_bytes=2 << 30, wall_s=60.0)
_MOST = 2  # processes, so that one slow body does not hold up the others
_MOST_OF_TENANT = 2  # of the largest bodies: bytes of one tenant that wait or are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a body is checked against while it is read."""

    max_depth: int
    max_prompts: int
    max_messages: int
    max_stop_strings: int
    max_stop_string_chars: int
    ignore_unknown: bool
    info: EngineInfo | None  # None until the engine was reached


def _completion(body: Mapping[str, Any], bounds: Bounds) -> CompletionRequest:
    return parse_completion(
        body, max_prompts=bounds.max_prompts, ignore_unknown=bounds.ignore_unknown
    )


def _chat(body: Mapping[str, Any], bounds: Bounds) -> ChatRequest:
    return parse_chat(body, ignore_unknown=bounds.ignore_unknown)


def _response(body: Mapping[str, Any], bounds: Bounds) -> ResponseRequest:
    return parse_response(body, max_items=bounds.max_messages, ignore_unknown=bounds.ignore_unknown)


def _tokenize(body: Mapping[str, Any], bounds: Bounds) -> TokenizeRequest:
    return parse_tokenize(body, ignore_unknown=bounds.ignore_unknown)


def _detokenize(body: Mapping[str, Any], bounds: Bounds) -> DetokenizeRequest:
    return parse_detokenize(body, ignore_unknown=bounds.ignore_unknown)


def _messages(body: Mapping[str, Any], bounds: Bounds) -> MessagesRequest:
    return parse_messages(
        body, max_messages=bounds.max_messages, ignore_unknown=bounds.ignore_unknown
    )


def _messages_count(body: Mapping[str, Any], bounds: Bounds) -> MessagesRequest:
    return parse_count(body, max_messages=bounds.max_messages, ignore_unknown=bounds.ignore_unknown)


def _ollama_chat(body: Mapping[str, Any], bounds: Bounds) -> OllamaRequest:
    return parse_ollama_chat(
        body, max_messages=bounds.max_messages, ignore_unknown=bounds.ignore_unknown
    )


def _ollama_generate(body: Mapping[str, Any], bounds: Bounds) -> OllamaRequest:
    return parse_ollama_generate(body, ignore_unknown=bounds.ignore_unknown)


def _ollama_show(body: Mapping[str, Any], bounds: Bounds) -> ShowRequest:
    return parse_show(body, ignore_unknown=bounds.ignore_unknown)


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], Bounds], Any]] = {
    "completion": _completion,
    "chat": _chat,
    "response": _response,
    "tokenize": _tokenize,
    "detokenize": _detokenize,
    "messages": _messages,
    "messages_count": _messages_count,
    "ollama_chat": _ollama_chat,
    "ollama_generate": _ollama_generate,
    "ollama_show": _ollama_show,
}


class RequestBodies:
    """Reads the bodies of all routes.

    The processes start with the first large bodies, and end at `close` or with this object.
    """

    def __init__(self, plane: RequestPlane) -> None:
        self._plane = plane
        self._large = JobProcesses(__name__, b"", _LIMITS, most=_MOST)
        self._turns = LoopTurns()
        self._large_bytes = Counter[str]()  # by tenant: waiting or being read

    def close(self) -> None:
        """Ends the processes; bodies that they read are refused."""
        self._large.close()

    async def completion(self, request: Request) -> CompletionRequest:
        return await self._read(request, "completion")

    async def chat(self, request: Request) -> ChatRequest:
        return await self._read(request, "chat")

    async def response(self, request: Request) -> ResponseRequest:
        return await self._read(request, "response")

    async def tokenize(self, request: Request) -> TokenizeRequest:
        return await self._read(request, "tokenize")

    async def detokenize(self, request: Request) -> DetokenizeRequest:
        return await self._read(request, "detokenize")

    async def messages(self, request: Request) -> MessagesRequest:
        return await self._read(request, "messages")

    async def messages_count(self, request: Request) -> MessagesRequest:
        return await self._read(request, "messages_count")

    async def ollama_chat(self, request: Request) -> OllamaRequest:
        return await self._read(request, "ollama_chat")

    async def ollama_generate(self, request: Request) -> OllamaRequest:
        return await self._read(request, "ollama_generate")

    async def ollama_show(self, request: Request) -> ShowRequest:
        return await self._read(request, "ollama_show")

    async def _read(self, request: Request, kind: str) -> Any:
        config = self._plane.config
        body = await read_body(request, config)
        bounds = Bounds(
            max_depth=config.max_json_depth,
            max_prompts=config.max_prompts,
            max_messages=config.max_chat_messages,
            max_stop_strings=config.max_stop_strings,
            max_stop_string_chars=config.max_stop_string_chars,
            ignore_unknown=config.unknown_fields is UnknownFields.IGNORE,
            info=self._plane.engine.info,
        )
        tenant = request.scope["caller"].name
        if len(body) <= _LARGE_BYTES:
            await self._turns.take(tenant)
            parsed = _PARSERS[kind](parse_object(body, bounds.max_depth), bounds)
        else:
            with self._large_of(tenant, len(body)):
                parsed = await self._read_large(tenant, kind, body, bounds)
        if bounds.ignore_unknown:
            request.scope[IGNORED_FIELDS] = list(parsed.ignored)
        return parsed

    @contextmanager
    def _large_of(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """Counts a large body of a tenant. Raises Overloaded if too much of its is in line.

        In bytes: many conversations of 100 kB are read at once, 8 MB of lists one after another.
        """
        most = _MOST_OF_TENANT * self._plane.config.max_body_bytes
        if self._large_bytes[tenant] + num_bytes > most:
            raise Overloaded(
                f"bodies of {self._large_bytes[tenant]} bytes of this client are being read; "
                f"send this one once they are answered: {most} bytes are read at a time",
                retry_after_s=1.0,
            )
        self._large_bytes[tenant] += num_bytes
        try:
            yield
        finally:
            self._large_bytes[tenant] -= num_bytes
            if not self._large_bytes[tenant]:
                del self._large_bytes[tenant]  # there is no end of tenants

    async def _read_large(self, tenant: str, kind: str, body: bytes, bounds: Bounds) -> Any:
        bounds = replace(bounds, info=self._plane.info)  # Unavailable before there is an engine
        try:
            parsed = await self._large.call(pickle.dumps((kind, body, bounds)), tenant)
        except JobStopped as error:
            raise RequestError(f"the body cannot be read: {error}") from None
        return pickle.loads(parsed)  # noqa: S301 - from our own code, which runs nobody else's


def make_handler(start: bytes) -> Handler:
    """Makes what runs in the process: a pickled job in, the pickled request out."""
    return _read_large


def _read_large(job: bytes) -> bytes:
    kind, body, bounds = pickle.loads(job)  # noqa: S301 - from the parent process
    parsed = _PARSERS[kind](parse_object(body, bounds.max_depth), bounds)
    return pickle.dumps(_checked(parsed, bounds), pickle.HIGHEST_PROTOCOL)


def _checked(parsed: Any, bounds: Bounds) -> Any:
    """Checks every field here, so that nothing long and wrong goes back; packs token ids."""
    info = bounds.info
    assert info is not None
    if isinstance(parsed, ChatRequest | TokenizeRequest) and parsed.messages is not None:
        ignored = list(parsed.ignored)
        checked = check_messages(
            parsed.messages,
            max_messages=bounds.max_messages,
            ignored=ignored if bounds.ignore_unknown else None,
        )
        parsed = replace(parsed, messages=checked, ignored=tuple(ignored[:MAX_IGNORED]))
    if isinstance(parsed, MessagesRequest | OllamaRequest):
        return replace(parsed, conversation=_checked_conversation(parsed.conversation, bounds))
    if isinstance(parsed, CompletionRequest | ChatRequest | ResponseRequest):
        check_stop(
            parsed.stop, max_count=bounds.max_stop_strings, max_chars=bounds.max_stop_string_chars
        )
        given_salt(parsed.cache_salt)
        parsed = replace(parsed, sampling=_checked_sampling(parsed.sampling, info))
    if isinstance(parsed, CompletionRequest):
        prompts = tuple(_packed_prompt(it, info, parsed.truncation) for it in parsed.prompts)
        return replace(parsed, prompts=prompts)
    if isinstance(parsed, DetokenizeRequest):
        return replace(parsed, tokens=array("i", token_ids("tokens", parsed.tokens, info.vocab)))
    return parsed


def _checked_conversation(given: Conversation, bounds: Bounds) -> Conversation:
    info = bounds.info
    assert info is not None
    messages = given.messages
    if messages:
        messages = check_messages(messages, max_messages=bounds.max_messages)
    check_stop(
        given.stop, max_count=bounds.max_stop_strings, max_chars=bounds.max_stop_string_chars
    )
    return replace(given, messages=messages, sampling=_checked_sampling(given.sampling, info))


def _checked_sampling(given: SamplingFields, info: EngineInfo) -> SamplingFields:
    """Checks all but the numbers of tokens, whose bounds depend on the prompt."""
    checked = check_id_lists(given, info)
    later = {
        name: None for name in ("max_tokens", "min_tokens") if type(getattr(given, name)) is int
    }
    resolve_sampling(
        replace(checked, **later), defaults=SamplingDefaults(), info=info, prompt_tokens=0
    )
    return checked


def _packed_prompt(
    prompt: str | tuple[int, ...], info: EngineInfo, truncation: Truncation | None
) -> Any:
    if isinstance(prompt, str):
        return prompt
    if truncation is not None:  # it may be longer than the context
        return array("i", token_ids("prompt", prompt, info.vocab))
    return array("i", check_prompt(prompt, info))
