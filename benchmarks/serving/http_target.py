"""Any OpenAI-compatible server as a target: its completions or its chat route."""

import time
from dataclasses import dataclass
from typing import Any

import orjson

from benchmarks.serving.dialects import DIALECTS, Dialect, dialect, dialect_of
from benchmarks.serving.failures import BenchmarkError, NotReady, RequestFailed
from benchmarks.serving.http_client import (
    CannotConnect,
    HttpClient,
    HttpFailure,
    NotEventStream,
)
from benchmarks.serving.record import Record
from benchmarks.serving.target import ServerInfo
from benchmarks.serving.workload import Job

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_PROBE = Job(at_s=0, prompt_tokens=8, output_tokens=4, seed=(0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Ways to ask a server; `auto` is decided by what the server says of itself."""

    api: str = "completions"  # or chat
    model: str | None = None  # None: the first that is served
    dialect: str = "auto"
    prompt: str = "auto"  # ids or text
    token_ids: tuple[int, int] = (100, 500)  # first and last id of prompts
    api_key: str | None = None


class HttpTarget:
    def __init__(self, url: str, options: HttpOptions) -> None:
        self._options = options
        self._client = HttpClient(url, api_key=options.api_key)
        self._path = _PATHS[options.api]
        self._dialect: Dialect = DIALECTS["openai"]
        self._info: ServerInfo | None = None

    async def check(self) -> ServerInfo:
        card = await self._model_card()
        wanted = self._options.dialect
        name = dialect_of(card.get("owned_by")) if wanted == "auto" else wanted
        self._dialect = dialect(name)
        self._info = ServerInfo(card["id"], name, self._prompt_kind(), card.get("max_model_len"))
        record = Record()
        try:
            await self.send(self.prepare(_PROBE), record)
        except RequestFailed as error:
            raise _explained(f"{self._client.url}{self._path}", error) from None
        return self._info

    def prepare(self, job: Job) -> bytes:
        assert self._info is not None
        body: dict[str, Any] = {
            "model": self._info.model,
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": self._dialect.stream_options,
            **self._dialect.fields,
        }
        if self._options.api == "chat":
            body["messages"] = [{"role": "user", "content": job.text()}]
        elif self._info.prompt == "ids":
            body["prompt"] = job.token_ids(*self._options.token_ids)
        else:
            body["prompt"] = job.text()
        return self._client.encode(self._path, orjson.dumps(body))

    async def send(self, request: bytes, record: Record) -> None:
        reader = _EventReader(record, self._dialect)
        record.sent_s = time.perf_counter()
        await self._client.stream(request, reader.on_event)
        reader.end()

    async def close(self) -> None:
        self._client.close()

    def _prompt_kind(self) -> str:
        kind, is_chat = self._options.prompt, self._options.api == "chat"
        if kind == "ids" and is_chat:
            raise BenchmarkError("--prompt ids: a chat takes text; use --api completions")
        if kind != "auto":
            return kind
        return "ids" if self._dialect.takes_token_ids and not is_chat else "text"

    async def _model_card(self) -> dict[str, Any]:
        """The entry of /v1/models that is to be used."""
        url, wanted = self._client.url, self._options.model
        try:
            listed = orjson.loads(await self._client.get("/v1/models"))["data"]
            cards = {card["id"]: card for card in listed}
        except RequestFailed as error:
            raise _explained(f"{url}/v1/models", error) from None
        except (ValueError, LookupError, TypeError):
            raise BenchmarkError(
                f"{url}/v1/models lists no models as an OpenAI-compatible server does; mend --url"
            ) from None
        if wanted is not None and wanted not in cards:
            raise BenchmarkError(
                f"{url} does not serve {wanted!r}; set --model to one of {', '.join(cards)}"
            )
        if not cards:
            raise BenchmarkError(f"{url}/v1/models lists no model; wait until the server has one")
        return cards[wanted or next(iter(cards))]


class _EventReader:
    """Reads the chunks of one answer into its record."""

    def __init__(self, record: Record, dialect: Dialect) -> None:
        self._record = record
        self._tokens_so_far = dialect.tokens_so_far
        self._told = 0
        self._has_ended = False

    def on_event(self, data: bytes, now_s: float) -> None:
        """Raises RequestFailed for an event that is an error or no chunk."""
        if data == b"[DONE]":
            self._has_ended = True
            return
        try:
            event = orjson.loads(data)
            if "error" in event:
                error = event["error"]
                raise RequestFailed(f"error event: {error.get('message', error)}")
            if usage := event.get("usage"):
                self._record.prompt_tokens = usage["prompt_tokens"]
                self._record.output_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                self._record.cached_tokens = details.get("cached_tokens")
            if event["choices"]:
                self._on_choice(event, event["choices"][0], now_s)
        except (ValueError, LookupError, TypeError, AttributeError):
            text = data[:100].decode("utf-8", "replace")
            raise RequestFailed(f"not a chunk of an answer: {text!r}") from None

    def end(self) -> None:
        """The connection has nothing more; RequestFailed if the answer was not complete."""
        if not self._has_ended:
            raise RequestFailed("the stream ended before the answer was complete")

    def _on_choice(self, event: dict[str, Any], choice: dict[str, Any], now_s: float) -> None:
        text = choice.get("text")
        if text is None:
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or ""
        so_far = self._tokens_so_far(event)
        new = 0 if so_far is None else so_far - self._told
        self._told += new
        self._record.arrive(now_s, text, new)
        if choice.get("finish_reason"):
            self._has_ended = True
            self._record.finish(now_s)


def _explained(where: str, error: RequestFailed) -> BenchmarkError:
    """Error that says why the server is not fit for the benchmark, and what to mend."""
    match error:
        case CannotConnect():
            return NotReady(f"{where}: {error}; start the server or mend --url")
        case HttpFailure(status=status) if status >= 500:
            return NotReady(f"{where}: {error}; wait until the server is ready")
        case HttpFailure(status=401 | 403):
            return BenchmarkError(f"{where}: {error}; give the right --api_key")
        case HttpFailure(status=404 | 405):
            remedy = "--url must be the root of an OpenAI-compatible server"
            return BenchmarkError(f"{where}: {error}; {remedy}")
        case HttpFailure():
            remedy = "try another --dialect, --prompt text or other --token_ids"
            return BenchmarkError(f"{where} refuses the requests: {error}; {remedy}")
        case NotEventStream():
            return BenchmarkError(f"{where} does not stream: {error}; mend --url or --api")
        case _:
            return BenchmarkError(f"{where}: {error}; mend --url, or look at the server's log")
