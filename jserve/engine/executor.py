"""Runs plans on the device: owns the device state, starts steps, copies results back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jserve.core.errors import EngineError
from jserve.core.step import Program, RowLogprobs, StepPlan, StepResult
from jserve.engine.program.batch import Batch, BatchShape, pack
from jserve.engine.program.layout import result_layout
from jserve.engine.program.page_mover import PageMover
from jserve.engine.program.programs import CompiledProgram
from jserve.engine.program.state import DeviceState
from jserve.engine.program.step import DeviceResult, Params
from jserve.model.sampling.logprobs import Logprobs


class StartedStep(NamedTuple):
    """A program that runs, and the pages that left the device before it."""

    batch: Batch  # kept because the device may still read its buffer
    result: DeviceResult
    num_out: int  # mark of `PageMover.land`


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step in flight."""

    plan: StepPlan
    step: StartedStep
    wants_logprobs: bool
    wants_prompt_logprobs: bool


class DeviceExecutor:
    """The `core.step.Executor` of a device. Owns `DeviceState`; used by one thread."""

    def __init__(
        self,
        params: Params,
        state: DeviceState,
        programs: Mapping[Program, CompiledProgram],
        shape: BatchShape,
        eos_token_ids: tuple[int, ...],
        mover: PageMover | None = None,
    ) -> None:
        """Without a `mover` no plan may move pages."""
        self._params = params
        self._state = state
        self._programs = {program: made.call for program, made in programs.items()}
        self._shape = shape
        self._mover = mover
        self._eos = eos_token_ids
        # On the devices already: a step without masks sends none.
        self._no_masks = jax.device_put(np.zeros(shape.masks, np.int32), state.lengths.sharding)
        self._wants_logprobs = np.zeros(shape.num_slots, bool)  # [slots], by the slot's sequence

    def submit(self, plan: StepPlan) -> PendingStep:
        """Packs the plan and starts its program; returns while the device works."""
        return self.submit_batch(plan, self.pack(plan))

    def pack(self, plan: StepPlan) -> Batch:
        """The buffer of a plan; pure."""
        return pack(plan, self._shape, self._eos)

    def run(self, batch: Batch) -> StartedStep:
        """Starts the moves and the program of a batch; nobody need collect the result."""
        if batch.moves:
            if self._mover is None:
                raise EngineError("the plan moves pages, but engine.host_pages is 0")
            kv = self._mover.run(self._state.kv, batch.moves)
            self._state = self._state._replace(kv=kv)
        call = self._programs[batch.program]
        masks = self._no_masks if batch.masks is None else batch.masks
        self._state, result = call(self._params, self._state, batch.buffer, masks)
        return StartedStep(batch, result, self._mover.num_out if self._mover else 0)

    def wait(self, step: StartedStep) -> tuple[int, ...]:
        """Waits for a step and its moves; returns the host pages that landed."""
        jax.block_until_ready(step.result.packed)
        return self._mover.land(step.num_out) if self._mover else ()

    def submit_batch(self, plan: StepPlan, batch: Batch) -> PendingStep:
        """Starts the step of `plan`, packed as `batch`; returns while the device works."""
        for admission in plan.admissions:
            wanted = admission.request.sampling.logprobs is not None
            self._wants_logprobs[admission.slot] = wanted
        step = self.run(batch)
        pending = PendingStep(
            plan,
            step,
            wants_logprobs=bool(self._wants_logprobs[batch.slots].any()),
            wants_prompt_logprobs=batch.has_targets,
        )
        step.result.packed.copy_to_host_async()
        if pending.wants_logprobs:
            jax.tree.map(lambda part: part.copy_to_host_async(), step.result.logprobs)
        return pending

    def collect(self, handle: PendingStep) -> StepResult:
        """Waits for the step and returns its outcome, row by row of the plan."""
        plan, result = handle.plan, handle.step.result
        rows = len(plan.chunks)
        outcome = result_layout(plan.program, self._shape.decode_tokens).views(
            np.asarray(result.packed)
        )
        prompt_logprobs = None
        if handle.wants_prompt_logprobs and result.prompt_logprobs is not None:
            num_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
            prompt_logprobs = _logprobs(result.prompt_logprobs, num_tokens)
        return StepResult(
            step_id=plan.step_id,
            tokens=outcome["tokens"][:rows],
            num_new=outcome["num_new"][:rows],
            finish=outcome["finish"][:rows],
            logprobs=_logprobs(result.logprobs, rows) if handle.wants_logprobs else None,
            prompt_logprobs=prompt_logprobs,
            landed=self.wait(handle.step),
        )


class LeadingExecutor:
    """An executor whose steps other processes run, too; see `core.step.Executor`."""

    def __init__(
        self, executor: DeviceExecutor, publish: Callable[[StepPlan, Batch], None]
    ) -> None:
        """`publish` tells the others of a step before this process starts it."""
        self._executor = executor
        self._publish = publish

    def submit(self, plan: StepPlan) -> PendingStep:
        """Starts the step everywhere."""
        batch = self._executor.pack(plan)
        self._publish(plan, batch)
        return self._executor.submit_batch(plan, batch)

    def collect(self, handle: PendingStep) -> StepResult:
        """Reads the outcome, which every process has whole."""
        return self._executor.collect(handle)


def _logprobs(found: Logprobs, count: int) -> RowLogprobs:
    return RowLogprobs(*(np.asarray(part)[:count] for part in found))
