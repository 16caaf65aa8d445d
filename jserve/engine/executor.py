"""Runs plans on the device: owns the device state, starts steps, copies results back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jserve.core.step import Program, RowLogprobs, StepPlan, StepResult
from jserve.engine.program.batch import Batch, BatchShape, pack
from jserve.engine.program.programs import CompiledProgram
from jserve.engine.program.state import DeviceState
from jserve.engine.program.step import DeviceResult, Params
from jserve.model.sampling.logprobs import Logprobs


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step in flight; the batch is kept because the device may still read its buffer."""

    plan: StepPlan
    batch: Batch
    result: DeviceResult
    wants_logprobs: bool
    wants_prompt_logprobs: bool


class DeviceExecutor:
    """See `core.step.Executor`. Owns `DeviceState`; used by one thread."""

    def __init__(
        self,
        params: Params,
        state: DeviceState,
        programs: Mapping[Program, CompiledProgram],
        shape: BatchShape,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._params = params
        self._state = state
        self._programs = {program: made.call for program, made in programs.items()}
        self._shape = shape
        self._eos = eos_token_ids
        self._wants_logprobs = np.zeros(shape.num_slots, bool)  # of the sequence in each slot

    def submit(self, plan: StepPlan) -> PendingStep:
        """Packs the plan and starts its program; returns while the device works."""
        return self.submit_batch(plan, self.pack(plan))

    def pack(self, plan: StepPlan) -> Batch:
        """The buffer of a plan; pure."""
        return pack(plan, self._shape, self._eos)

    def run(self, batch: Batch) -> DeviceResult:
        """Starts the program of a batch; nobody need collect its result."""
        call = self._programs[batch.program]
        self._state, result = call(self._params, self._state, batch.buffer)
        return result

    def submit_batch(self, plan: StepPlan, batch: Batch) -> PendingStep:
        """See `submit`; `batch` is the packed plan."""
        for admission in plan.admissions:
            wanted = admission.request.sampling.logprobs is not None
            self._wants_logprobs[admission.slot] = wanted
        result = self.run(batch)
        pending = PendingStep(
            plan,
            batch,
            result,
            wants_logprobs=bool(self._wants_logprobs[batch.slots].any()),
            wants_prompt_logprobs=batch.has_targets,
        )
        result.tokens.copy_to_host_async()
        if pending.wants_logprobs:
            jax.tree.map(lambda part: part.copy_to_host_async(), result.logprobs)
        return pending

    def collect(self, handle: PendingStep) -> StepResult:
        """Waits for the step and returns its outcome in the plan's order of chunks."""
        order, result = handle.batch.order, handle.result
        rows = np.empty_like(order)
        rows[order] = np.arange(len(order))
        packed = np.asarray(result.tokens)[rows]
        prompt_logprobs = None
        if handle.wants_prompt_logprobs and result.prompt_logprobs is not None:
            prompt_logprobs = _logprobs(result.prompt_logprobs, _plan_tokens(handle))
        return StepResult(
            step_id=handle.plan.step_id,
            tokens=packed[:, :-2],
            num_new=packed[:, -2],
            finish=packed[:, -1],
            logprobs=_logprobs(result.logprobs, rows) if handle.wants_logprobs else None,
            prompt_logprobs=prompt_logprobs,
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


def _plan_tokens(handle: PendingStep) -> np.ndarray:
    """The ragged index on the device of each token of the plan, chunk after chunk."""
    firsts = handle.batch.first_token
    return np.concatenate(
        [
            np.arange(first, first + chunk.num_tokens)
            for first, chunk in zip(firsts, handle.plan.chunks, strict=True)
        ]
    )


def _logprobs(found: Logprobs, index: np.ndarray) -> RowLogprobs:
    return RowLogprobs(*(np.asarray(part)[index] for part in found))
