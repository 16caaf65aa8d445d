"""Text to token ids and back, by the model's own tokenizer."""

from collections.abc import Sequence


class TextTokenizer:
    """Wraps a `tokenizers.Tokenizer`. Immutable; safe to use from several threads."""

    vocab: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]: ...

    async def encode_async(
        self, text: str, *, add_special_tokens: bool | None = None
    ) -> list[int]:
        """`encode`, off the event loop when the text is long."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; for logprobs."""
        ...

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, undecodable bytes replaced."""
        ...
