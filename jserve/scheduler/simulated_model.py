"""A language model that is a hash: what `SimulatedExecutor` computes, and the answer to expect."""

from dataclasses import dataclass

from jserve.core.request import MAX_LOGPROBS, FinishReason, Request, TokenLogprobs
from jserve.scheduler.constraint import Constraint

_MASK = (1 << 64) - 1
EMPTY_DIGEST = 0x9E3779B97F4A7C15  # the digest of an empty context


def extend(digest: int, token: int) -> int:
    """The digest of a context that is one token longer: what one position of KV memory holds."""
    mixed = ((digest ^ token) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ (mixed >> 29)


def allows(mask: bytes, token: int) -> bool:
    """Whether `mask`, as in `MaskRow.words`, allows `token`."""
    return bool(mask[token // 8] >> token % 8 & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedModel:
    """Each token is a pure function of all tokens before it, the seed and the choice.

    Of the sampling parameters it honours seed, max_tokens, min_tokens, ignore_eos, stop_token_ids,
    logprobs and prompt_logprobs. Log-probabilities are made up, but equal for equal contexts.
    """

    vocab: int = 256
    eos_token_ids: tuple[int, ...] = (0,)

    def stop_ids(self, request: Request) -> frozenset[int]:
        """Ids that end `request`."""
        eos = () if request.sampling.ignore_eos else self.eos_token_ids
        return frozenset((*eos, *request.sampling.stop_token_ids))

    def sample(
        self, digest: int, request: Request, num_output: int, mask: bytes | None = None
    ) -> int:
        """The token after a context of `digest` that holds `num_output` output tokens.

        One that the mask forbids gives way to the next one that it allows.
        """
        token = extend(digest, request.sampling.seed + 31 * request.choice) % self.vocab
        early = num_output < request.sampling.min_tokens
        stops = self.stop_ids(request) if early else frozenset[int]()
        while token in stops or not (mask is None or allows(mask, token)):
            token = (token + 1) % self.vocab
        return token

    def logprobs(self, digest: int, token: int) -> TokenLogprobs:
        """Log-probabilities of `token` after `digest`, with MAX_LOGPROBS alternatives."""
        best = extend(digest, -1) % self.vocab
        return TokenLogprobs(
            token_id=token,
            logprob=-float((digest ^ token) % 1024) / 64,
            rank=1 + (token - best) % self.vocab,
            top=tuple(((best + i) % self.vocab, -float(i) / 64) for i in range(MAX_LOGPROBS)),
        )

    def generate(
        self, request: Request, max_model_len: int, constraint: Constraint | None = None
    ) -> tuple[list[int], FinishReason]:
        """The whole output of `request`, alone and undisturbed; every token is masked."""
        digest = EMPTY_DIGEST
        for token in request.prompt:
            digest = extend(digest, token)
        stops = self.stop_ids(request)
        output: list[int] = []
        most = min(request.sampling.max_tokens, max_model_len - len(request.prompt))
        while True:
            mask = None if constraint is None else constraint.mask()
            token = self.sample(digest, request, len(output), mask)
            output.append(token)
            if constraint is not None:
                constraint.accept((token,))
            if token in stops and len(output) > request.sampling.min_tokens:
                return output, FinishReason.STOP
            if len(output) == most:
                return output, FinishReason.LENGTH
            digest = extend(digest, token)
