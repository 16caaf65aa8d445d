"""The step program: everything between two looks at the host, as one pure function.

    batch → page tables, admissions → embed → layers → logits of the rows that sample
          → logit processors → sample → logprobs → stop test → state

`mixed_step` runs a ragged batch of prompt chunks and decode tokens; `decode_step` runs several
decode steps of its rows. Both use `_advance` for all that follows the layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jserve.core.step import FinishCode, Program, ProgramKind
from jserve.engine.program.batch import BatchShape, layout
from jserve.engine.program.layout import result_layout
from jserve.engine.program.state import DeviceState
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.sampling.logprobs import Logprobs, no_logprobs
from jserve.model.sampling.sample import sampler_config
from jserve.model.sampling.sharded import ShardedSampler
from jserve.model.sampling.state import (
    admit,
    admit_processors,
    clear_step_masks,
    set_step_masks,
    stop_code,
)
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch, make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.sharded import sharded_attention

_PROMPT_LOGPROB_ROWS = 32  # rows of the head at a time when prompt logprobs are asked for

Params = dict[str, jax.Array]


class LayerKV(NamedTuple):
    """The pages and scales that one attention layer reads and writes."""

    pages: jax.Array
    scales: jax.Array  # [K|V, stored_kv_heads]


class DeviceResult(NamedTuple):
    """One step's outcome on the device; the host copies only what a plan needs."""

    packed: jax.Array  # [words] int32, by `result_layout`
    logprobs: Logprobs  # [rows, steps, …]
    prompt_logprobs: Logprobs | None  # [tokens, 1, …], mixed only


# The carry of a decode program's loop: decode steps done, state, result by name, logprobs.
_Carry = tuple[jax.Array, DeviceState, dict[str, jax.Array], Logprobs]


class _Rows(NamedTuple):
    """The rows of one step: their slots, which of them sample, and their new lengths."""

    slots: jax.Array  # [rows]; out of range for idle rows
    live: jax.Array  # [rows] the slot runs
    samples: jax.Array  # [rows] and yields a token
    lengths: jax.Array  # [rows] tokens in KV memory after this step
    num_sampling: jax.Array  # only rows < num_sampling can sample


def make_step(model: Model, mesh: Mesh, program: Program, shape: BatchShape):
    """The program as `(params, state, buffer, masks) -> (state, result)`, to be jitted.

    Raises ValueError for a shape with a feature that no program reads.
    """
    if unread := [name for name, found in _features(shape).items() if found]:
        raise ValueError(f"the step programs do not implement {', '.join(unread)} of {shape}")
    if model.spec.experts and mesh.size > 1 and model.mesh != mesh:
        raise ValueError(f"experts are spread over {mesh}, but the model was made for {model.mesh}")
    step = mixed_step if program.kind is ProgramKind.MIXED else decode_step
    return functools.partial(step, model, mesh, program, shape)


def _features(shape: BatchShape) -> dict[str, bool]:
    """Whether `shape` has each of the features whose sections no program reads."""
    return {
        "has_adapters": shape.has_adapters,
        "decode_tokens": shape.decode_tokens > 1,
        "page_groups": shape.page_groups > 1,
    }


def mixed_step(
    model: Model,
    mesh: Mesh,
    program: Program,
    shape: BatchShape,
    params: Params,
    state: DeviceState,
    buffer: jax.Array,
    masks: jax.Array,
) -> tuple[DeviceState, DeviceResult]:
    """One step over a ragged batch: decode rows first, then prompt chunks."""
    batch = layout(program, shape).unpack(buffer)
    sampler = ShardedSampler(mesh, shape.vocab)
    state = _mask(_admit(sampler, _grow_tables(state, batch), batch), batch, masks)
    slots = batch["row_slot"]
    row = jnp.arange(program.rows)
    decode = row < batch["num_decode"]
    safe_slots = jnp.clip(slots, 0, shape.num_slots - 1)
    live = (row < batch["num_rows"]) & state.active[safe_slots]
    starts = jnp.where(decode, state.lengths[safe_slots], batch["row_start"])
    q_lens = jnp.where(live, batch["row_tokens"], 0)

    token = jnp.arange(program.tokens)
    owner = batch["token_row"]
    offset = token - batch["row_first"][owner]
    token_live = (offset >= 0) & (offset < q_lens[owner])
    positions = jnp.where(token_live, starts[owner] + offset, 0)
    tokens = jnp.where(decode[owner], state.last_tokens[safe_slots][owner], batch["tokens"])

    state = state._replace(
        sampler=sampler.count_chunk(
            state.sampler,
            slots[owner],
            tokens,
            positions < state.prompt_lens[safe_slots][owner],
            token_live & ~decode[owner],
        )
    )
    samples = live & (batch["row_max_new"] > 0)
    num_sampling = jnp.where(jnp.any(samples), batch["num_rows"], 0)
    rows = _Rows(slots, live, samples, starts + q_lens, num_sampling)
    ragged = make_ragged_batch(
        state.page_tables[0][safe_slots],
        jnp.where(live, rows.lengths, 0),
        batch["row_first"],
        q_lens,
        batch["num_decode"],
        batch["num_rows"],
        owner,
        positions,
        token_live,
        page_size=shape.page_size,
    )
    state, hidden = _layers(
        model, mesh, params, state, tokens, positions, ragged, batch["num_tokens"], prompts=True
    )
    last = jnp.clip(batch["row_first"] + batch["row_tokens"] - 1, 0, program.tokens - 1)
    state, tokens_new, finish, logprobs = _advance(model, mesh, params, state, hidden[last], rows)
    outcome = {"tokens": tokens_new[:, None], "num_new": rows.samples, "finish": finish}
    result = DeviceResult(
        result_layout(program, shape.decode_tokens).pack(outcome),
        jax.tree.map(lambda part: part[:, None], logprobs),
        _prompt_logprobs(model, mesh, params, hidden, batch["token_target"]),
    )
    return state, result


def decode_step(
    model: Model,
    mesh: Mesh,
    program: Program,
    shape: BatchShape,
    params: Params,
    state: DeviceState,
    buffer: jax.Array,
    masks: jax.Array,
) -> tuple[DeviceState, DeviceResult]:
    """Up to `program.steps` decode steps; a row that finishes, or is at its limit, freezes."""
    batch = layout(program, shape).unpack(buffer)
    state = _mask(_grow_tables(state, batch), batch, masks)
    slots = batch["row_slot"]
    row = jnp.arange(program.rows)
    safe_slots = jnp.clip(slots, 0, shape.num_slots - 1)
    tables = state.page_tables[0][safe_slots]

    def running(n: jax.Array, state: DeviceState) -> jax.Array:
        return (row < batch["num_rows"]) & (n < batch["row_limit"]) & state.active[safe_slots]

    def more(carry: _Carry) -> jax.Array:
        n, state, *_ = carry
        return (n < batch["num_steps"]) & jnp.any(running(n, state))

    def decode(carry: _Carry) -> _Carry:
        n, state, outcome, logprobs = carry
        live = running(n, state)
        starts = state.lengths[safe_slots]
        rows = _Rows(slots, live, live, starts + 1, batch["num_rows"])
        positions = jnp.where(live, starts, 0)
        ragged = make_ragged_batch(
            tables,
            jnp.where(live, rows.lengths, 0),
            row,
            live.astype(jnp.int32),
            batch["num_rows"],
            batch["num_rows"],
            row,
            positions,
            live,
            page_size=shape.page_size,
        )
        tokens = state.last_tokens[safe_slots]
        state, hidden = _layers(
            model, mesh, params, state, tokens, positions, ragged, batch["num_rows"], prompts=False
        )
        state, tokens, finish, new = _advance(model, mesh, params, state, hidden, rows)
        outcome = {
            "tokens": outcome["tokens"].at[:, n].set(tokens),
            "num_new": outcome["num_new"] + live.astype(jnp.int32),
            "finish": jnp.where(live, finish, outcome["finish"]),
        }
        logprobs = jax.tree.map(lambda all_, part: all_.at[:, n].set(part), logprobs, new)
        return n + 1, state, outcome, logprobs

    outputs = result_layout(program, shape.decode_tokens)
    start = (jnp.int32(0), state, outputs.zeros(), _no_logprobs(program.rows, program.steps))
    _, state, outcome, logprobs = lax.while_loop(more, decode, start)
    return state, DeviceResult(outputs.pack(outcome), logprobs, None)


def _layers(
    model: Model,
    mesh: Mesh,
    params: Params,
    state: DeviceState,
    tokens: jax.Array,
    positions: jax.Array,
    ragged: RaggedBatch,
    num_tokens: jax.Array,
    *,
    prompts: bool,
) -> tuple[DeviceState, jax.Array]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, kv: LayerKV, window: int):
        out, pages = sharded_attention(
            *(q, k, v, kv.pages, ragged),
            window=window,
            prompts=prompts,
            backend=model.backend,
            mesh=mesh,
            kv_scales=kv.scales,
        )
        return out, LayerKV(pages, kv.scales)

    layers = tuple(map(LayerKV, state.kv[0], state.kv_scales))
    hidden, kv = model.hidden(params, tokens, positions, layers, StepContext(attend, num_tokens))
    return state._replace(kv=(tuple(layer.pages for layer in kv),)), hidden


def _advance(
    model: Model, mesh: Mesh, params: Params, state: DeviceState, hidden: jax.Array, rows: _Rows
) -> tuple[DeviceState, jax.Array, jax.Array, Logprobs]:
    """From the hidden states of the rows to their tokens, verdicts and the state after them."""
    logits = model.logits(params, hidden, rows.num_sampling)
    config = sampler_config(model.backend, rows.slots.shape[0])
    sampler = ShardedSampler(mesh, model.spec.vocab, config)
    sampled = sampler.sample(logits, state.sampler, rows.slots, rows.lengths, rows.samples)
    lengths = rows.lengths + 1  # with the sampled token
    finish = stop_code(state.sampler, rows.slots, sampled.tokens, lengths, rows.samples)
    # Out of range, so that the scatters below drop what must not change.
    drop_index = state.lengths.shape[0]
    live_slots = jnp.where(rows.live, rows.slots, drop_index)
    sampling_slots = jnp.where(rows.samples, rows.slots, drop_index)
    state = state._replace(
        lengths=state.lengths.at[live_slots].set(rows.lengths, mode="drop"),
        last_tokens=state.last_tokens.at[sampling_slots].set(sampled.tokens, mode="drop"),
        active=state.active.at[sampling_slots].set(finish == FinishCode.RUNNING, mode="drop"),
        sampler=clear_step_masks(
            sampler.observe(state.sampler, rows.slots, sampled.tokens, rows.samples)
        ),
    )
    return state, sampled.tokens, finish, sampled.logprobs


def _grow_tables(state: DeviceState, batch: dict[str, jax.Array]) -> DeviceState:
    slots, places, ids = (batch[name] for name in ("page_slot", "page_index", "page_id"))
    tables = tuple(
        table.at[slots[group], places[group]].set(ids[group], mode="drop")
        for group, table in enumerate(state.page_tables)
    )
    return state._replace(page_tables=tables)


def _mask(state: DeviceState, batch: dict[str, jax.Array], masks: jax.Array) -> DeviceState:
    """Keeps the step's masks for the first token of their slots."""
    sampler = set_step_masks(state.sampler, batch["num_masks"], batch["mask_slot"], masks)
    return state._replace(sampler=sampler)


def _admit(split: ShardedSampler, state: DeviceState, batch: dict[str, jax.Array]) -> DeviceState:
    """Gives slots to new sequences; whatever their predecessors left behind is overwritten."""
    slots = batch["admit_slot"]
    kept = jnp.ones_like(state.active).at[slots].set(False, mode="drop")
    sampler = split.reset(state.sampler, kept)
    sampler = admit(sampler, slots, batch["admit_words"])
    sampler = admit_processors(sampler, batch["processor_slot"], batch["processor_words"])
    if batch["history_slot"].size:
        sampler = split.restore(sampler, batch["history_slot"], batch["history_words"])
    return state._replace(
        active=state.active.at[slots].set(True, mode="drop"),
        lengths=state.lengths.at[slots].set(batch["admit_computed"], mode="drop"),
        last_tokens=state.last_tokens.at[slots].set(batch["admit_last_token"], mode="drop"),
        prompt_lens=state.prompt_lens.at[slots].set(batch["admit_prompt"], mode="drop"),
        sampler=sampler,
    )


def _no_logprobs(rows: int, steps: int) -> Logprobs:
    none = no_logprobs(rows * steps)
    return jax.tree.map(lambda part: part.reshape(rows, steps, *part.shape[1:]), none)


def _prompt_logprobs(
    model: Model, mesh: Mesh, params: Params, hidden: jax.Array, targets: jax.Array
) -> Logprobs:
    """Log-probabilities of the next prompt token after each token that has a target ≥ 0.

    The head runs over tiles of rows, and only over tiles with a target: logits of the whole
    ragged batch never exist at once.
    """
    tokens = hidden.shape[0]
    sampler = ShardedSampler(mesh, model.spec.vocab)
    tile = min(_PROMPT_LOGPROB_ROWS, tokens)
    num_tiles = -(-tokens // tile)
    padding = num_tiles * tile - tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding), constant_values=-1)

    def head(i: jax.Array, found: Logprobs) -> Logprobs:
        rows = lax.dynamic_slice_in_dim(hidden, i * tile, tile)
        wanted = lax.dynamic_slice_in_dim(targets, i * tile, tile)
        new = sampler.prompt_logprobs(model.logits(params, rows), jnp.maximum(wanted, 0))
        return jax.tree.map(
            lambda all_, part: lax.dynamic_update_slice_in_dim(all_, part[:, None], i * tile, 0),
            found,
            new,
        )

    def maybe(i: jax.Array, found: Logprobs) -> Logprobs:
        wanted = lax.dynamic_slice_in_dim(targets, i * tile, tile)
        return lax.cond(jnp.any(wanted >= 0), functools.partial(head, i), lambda x: x, found)

    found = lax.fori_loop(0, num_tiles, maybe, _no_logprobs(num_tiles * tile, 1))
    return jax.tree.map(lambda part: part[:tokens], found)
