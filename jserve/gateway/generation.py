"""The request plane without a wire: prompts in, validated generations, pieces of text out.

Every front end (HTTP, gRPC) parses into `Prompt` and `SamplingFields`, calls `prepare`, iterates
`run`, and writes the pieces in its own format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jserve.core.clock import Clock
from jserve.core.request import FinishReason, SamplingParams, TokenLogprobs
from jserve.gateway.config import GatewayConfig
from jserve.gateway.engine_client import EngineClient
from jserve.gateway.tokenizer import TextTokenizer
from jserve.gateway.validation import SamplingFields


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they came from when it was text."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a front end asks for, validated, every field resolved."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    echo: bool = False  # the text of each choice starts with the prompt's text
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one choice.

    `text` may lag behind `token_ids` while half a character or half a stop string is held back;
    the concatenation of all texts is the answer. `token_ids`, and `logprobs` parallel to it, run
    to the token that completed a stop string; their number is the usage.
    """

    index: int  # choice
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # when requested
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # on the first piece
    finish: FinishReason | None = None  # on the last piece of the choice
    stop_reason: str | int | None = None  # stop string or stop_token_id; None for end of sequence
    queue_s: float | None = None  # on the first piece
    ttft_s: float | None = None  # on the first piece: `run` to the first token


class Pieces:
    """An asynchronous iterator of `Piece`; choices interleave.

    `__anext__` may be cancelled (a timeout for keep-alive frames) and called again without loss.
    Errors of the engine (Overloaded, Unavailable, EngineError, RequestError) are raised by it, the
    first three usually by the first call. `close` aborts every choice; idempotent, not blocking.
    """

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> Piece: ...

    def close(self) -> None: ...

    async def aclose(self) -> None:
        """`close`, for contextlib.aclosing."""
        self.close()


class Generator:
    """Owns the tokenizer, the defaults and the connection to the engine."""

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        engine: EngineClient,
        config: GatewayConfig,
        clock: Clock,
    ) -> None: ...

    tokenizer: TextTokenizer
    engine: EngineClient
    config: GatewayConfig

    @property
    def model_name(self) -> str:
        """The served name."""
        ...

    @property
    def ready(self) -> bool: ...

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is None, empty or the served one."""

    async def text_prompt(self, text: str, *, add_special_tokens: bool | None = None) -> Prompt:
        """Tokenizes; None keeps the tokenizer's own habit of adding a BOS."""
        ...

    def token_prompt(self, ids: Sequence[int]) -> Prompt: ...

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Renders the model's chat template and tokenizes; RequestError if there is none."""
        ...

    def prepare(
        self,
        *,
        id: str,  # noqa: A002
        prompt: Prompt,
        sampling: SamplingFields,
        stop: str | Sequence[str] | None = None,
        n: int | None = None,
        priority: int | None = None,
        echo: bool | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
    ) -> Generation:
        """Checks every field and resolves the defaults; None means not given.

        Raises RequestError (with `param`), PromptTooLong, Unavailable before the engine was
        ever seen (its context length is not known yet).
        """
        ...

    def run(self, generation: Generation) -> Pieces:
        """Starts every choice. Raises Unavailable at once when no engine is there."""
        ...
