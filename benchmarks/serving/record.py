"""Record of one request: its sending, the arrival of its text, its tokens."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """Times are of `time.perf_counter`. Owned by whoever sends the request."""

    planned_s: float | None = None  # when it should have been sent; None in a closed loop
    asked_tokens: tuple[int, int] | None = None  # tokens of prompt and answer
    sent_s: float = 0.0
    end_s: float = 0.0  # the end of the stream
    chunk_s: list[float] = field(default_factory=list[float])  # receipt of each chunk with text
    chunk_tokens: list[int] = field(default_factory=list[int])  # told by the server; 0: not told
    chunk_chars: list[int] = field(default_factory=list[int])
    prompt_tokens: int | None = None  # told by the server
    output_tokens: int | None = None  # told by the server
    cached_tokens: int | None = None  # of the prompt and not computed, told by the server
    error: str | None = None
    _silent_tokens: int = 0  # told since the last chunk with text

    def arrive(self, now_s: float, text: str, num_tokens: int = 0) -> None:
        """A chunk came. Without text (half a character is held back) it waits for the next one."""
        if not text:
            self._silent_tokens += num_tokens
            return
        self.chunk_s.append(now_s)
        self.chunk_tokens.append(num_tokens + self._silent_tokens)
        self.chunk_chars.append(len(text))
        self._silent_tokens = 0

    def finish(self, now_s: float) -> None:
        """The answer is complete; if it had no text at all, this is when its tokens came."""
        if not self.chunk_s:
            self.arrive(now_s, " ")

    @property
    def tokens(self) -> int:
        """Output tokens: as told, else one per chunk."""
        return len(self.chunk_s) if self.output_tokens is None else self.output_tokens

    @property
    def tells_chunks(self) -> bool:
        """Whether the server told how many tokens each chunk has."""
        return any(self.chunk_tokens)

    def tokens_by_chunk(self) -> list[int]:
        """The tokens of each chunk, at least 1: as told, else estimated from the length of text.

        The estimate gives each chunk one token and shares out the others.
        """
        if self.tells_chunks:
            return [max(1, count) for count in self.chunk_tokens]
        chunks, chars = len(self.chunk_s), sum(self.chunk_chars)
        others = max(0, self.tokens - chunks)
        shares: list[int] = []
        chars_so_far = given = 0
        for count in self.chunk_chars:
            chars_so_far += count
            due = round(others * chars_so_far / chars)
            shares.append(1 + due - given)
            given = due
        return shares
