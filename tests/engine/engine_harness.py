"""A tiny engine in this process: real scheduler, real programs, no wire."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jserve.cache.config import CacheConfig
from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.checkpoints.config import Quantization
from jserve.core.model_spec import ModelSpec
from jserve.core.request import FinishReason, Request, SequenceUpdate, TokenLogprobs
from jserve.engine.build.assembly import Engine, build_engine
from jserve.engine.config import EngineConfig
from jserve.engine.pipeline import Pipeline
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend, backend_for
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.constraint import Constraint
from jserve.scheduler.scheduler import Scheduler
from tests.model.model_harness import dense_logits

TINY = ModelSpec(
    family="llama",
    vocab=96,
    layers=2,
    model_dim=32,
    ffn_dim=64,
    q_heads=4,
    kv_heads=2,
    head_dim=8,
    max_position=512,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_embeddings=True,
    eos_token_ids=(1,),
)
CONFIG = EngineConfig(
    num_slots=4,
    page_size=8,
    num_pages=160,
    max_model_len=256,
    mixed_tokens=(8, 32),
    decode_rows=(4,),
    decode_steps=4,
)
MOVING = replace(CONFIG, host_pages=12)  # the same with moves of pages, and so with histories

SCHEDULER = SchedulerConfig(decode_wait_s=0.0)  # whole decode runs, though a turn is a second


@dataclass
class Outcome:
    """All updates of a sequence, merged."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None


class Harness:
    """Drives one engine; each `run` starts from an idle engine and must leave it idle."""

    def __init__(
        self,
        spec: ModelSpec = TINY,
        config: EngineConfig = CONFIG,
        params: dict[str, jax.Array] | None = None,
        backend: Backend | None = None,
        quantization: Quantization = Quantization.NONE,
        mesh_shape: tuple[int, int] = (1, 1),  # model × expert
        cache_folder: Path | None = None,  # holds compiled programs, for engines that share them
    ) -> None:
        # Users get the native kernels, where they are built.
        backend = backend or backend_for("cpu", jnp.dtype(jnp.float32), device_kind="cpu")
        devices = jax.devices()[: mesh_shape[0] * mesh_shape[1]]
        mesh = device_mesh(devices, model=mesh_shape[0], expert=mesh_shape[1])
        self.model = Model(spec, jnp.float32, backend, quantization, mesh)
        if params is None:
            shardings = param_shardings(self.model.param_specs(), spec, mesh)
            params = self.model.init(0, shardings)
        self.params = params
        self.config = config
        self.engine: Engine = build_engine(
            "tiny",
            self.model,
            mesh,
            lambda: self.params,
            config,
            SCHEDULER,
            cache_config=CacheConfig(prefix=False),  # or runs would depend on those before
            cache_folder=cache_folder,
        )

    def scheduler_with(self, num_pages: int, sharing: PrefixSharing | None = None) -> Scheduler:
        """A scheduler that uses fewer pages than there are, which forces preemptions."""
        return Scheduler(
            SCHEDULER,
            cache=KVCache(single_group(self.config.page_size), num_pages, sharing),
            num_slots=self.config.num_slots,
            max_model_len=self.engine.info.max_model_len,
            programs=self.config.programs(),
            max_processor_rows=self.config.processor_rows,
            eos_token_ids=self.engine.info.eos_token_ids,
        )

    def run(
        self,
        requests: list[Request],
        arrivals: list[int] | None = None,
        *,
        overlap: bool = True,
        scheduler: Scheduler | None = None,
        constraints: Mapping[str, Constraint] | None = None,
    ) -> dict[str, Outcome]:
        """Runs requests to their end; request i arrives before turn `arrivals[i]`.

        With `overlap`, a step is planned while the one before it runs. `scheduler` replaces the
        engine's own.
        """
        scheduler = scheduler or self.engine.scheduler
        arrivals = arrivals or [0] * len(requests)
        outcomes = {request.id: Outcome() for request in requests}
        queue = deque(sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0]))
        pipeline = Pipeline(scheduler, self.engine.executor, depth=2 if overlap else 1)
        compiles = self.engine.num_compiles()
        for turn in range(10_000):
            now_s = float(turn)
            while queue and queue[0][0] <= turn:
                request = queue.popleft()[1]
                scheduler.add(request, now_s, (constraints or {}).get(request.id))
            updates = pipeline.turn(lambda now_s=now_s: now_s)
            for update in updates or ():
                note(outcomes[update.request_id], update)
            if updates is None and not pipeline.num_in_flight and not queue:
                break
        stats = scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.free_slots == self.config.num_slots
        assert self.engine.num_compiles() == compiles, "a program was compiled while serving"
        return outcomes

    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        """The expected continuation, from a dense forward over everything at each step."""
        return greedy_tokens(self.model, self.params, [prompt], num_tokens)[0]

    def dense_logits(self, tokens: list[int]) -> np.ndarray:
        """Logits at every position, by whole-context attention without pages."""
        padded = np.zeros(self.engine.info.max_model_len, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(dense_logits(self.model)(self.params, jnp.asarray(padded)))[: len(tokens)]


def greedy_tokens(
    model: Model, params: dict[str, jax.Array], prompts: list[tuple[int, ...]], num_tokens: int
) -> list[list[int]]:
    """The continuation of each prompt, from a dense forward over everything at each step."""
    found: list[list[int]] = []
    padded = np.zeros(max(map(len, prompts)) + num_tokens, np.int32)
    for prompt in prompts:
        padded[: len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + num_tokens):
            logits = dense_logits(model)(params, jnp.asarray(padded))
            padded[at] = np.argmax(logits[at - 1])
        found.append(padded[len(prompt) : len(prompt) + num_tokens].tolist())
    return found


def note(outcome: Outcome, update: SequenceUpdate) -> None:
    """Adds an update to what its sequence was told before."""
    assert outcome.finish is None, "an update after the finish"
    outcome.tokens += update.tokens
    outcome.logprobs += update.logprobs or ()
    outcome.finish = update.finish
    if update.prompt_logprobs is not None:
        assert outcome.prompt_logprobs is None
        outcome.prompt_logprobs = update.prompt_logprobs
