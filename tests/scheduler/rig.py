"""A scheduler and a simulated device that checks every plan, driven by hand."""

from typing import Any

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.step import Program, ProgramKind, StepPlan, StepResult
from jserve.engine.pipeline import Pipeline
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.policy import FIRST_COME_FIRST_SERVED, Policy
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

ENDLESS = SimulatedModel(vocab=97, eos_token_ids=())  # nothing stops but the limit
MIXED_8 = Program(ProgramKind.MIXED, 8, 4)
MIXED_32 = Program(ProgramKind.MIXED, 32, 4)
DECODE_2 = Program(ProgramKind.DECODE, 2, 2, 8)
DECODE_4 = Program(ProgramKind.DECODE, 4, 4, 8)
PROGRAMS = (MIXED_32, DECODE_4, MIXED_8, DECODE_2)


class Recording(SimulatedExecutor):
    """Remembers the plans that it ran."""

    def __init__(self, programs: tuple[Program, ...], **sizes: Any) -> None:
        super().__init__(programs, **sizes)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return super().submit(plan)


class Rig:
    """A scheduler of four slots, a simulated device, and steps in flight between them."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        num_slots: int = 4,
        num_pages: int = 100,
        max_model_len: int = 100,
        programs: tuple[Program, ...] = PROGRAMS,
        model: SimulatedModel = ENDLESS,
        max_processor_rows: int = 8,
        policy: Policy = FIRST_COME_FIRST_SERVED,
        cache: KVCache | None = None,
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(
            config or SchedulerConfig(),
            cache=cache or KVCache(single_group(4), num_pages),
            num_slots=num_slots,
            max_model_len=max_model_len,
            programs=programs,
            max_processor_rows=max_processor_rows,
            policy=policy,
            eos_token_ids=model.eos_token_ids,
        )
        self.executor = Recording(
            programs,
            num_slots=num_slots,
            num_pages=num_pages,
            page_size=4,
            model=model,
            max_processor_rows=max_processor_rows,
            pages_per_slot=-(-max_model_len // 4),
        )
        self.pipeline = Pipeline(self.scheduler, self.executor)
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.now_s = 0.0

    def add(
        self, name: str, prompt: int = 3, max_tokens: int = 4, priority: int = 0, **sampling: object
    ) -> Request:
        request = Request(
            id=name,
            prompt=tuple((i * i + len(name)) % self.model.vocab for i in range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # pyright: ignore
            priority=priority,
        )
        self.scheduler.add(request, self.now_s)
        return request

    @property
    def in_flight(self) -> list[StepPlan]:
        """Plans that are submitted and not committed, the oldest first."""
        plans = self.executor.plans
        return plans[len(plans) - self.pipeline.num_in_flight :]

    def plan(self) -> StepPlan:
        plan = self.pipeline.start(self.now)
        assert plan is not None
        return plan

    def commit(self) -> list[SequenceUpdate]:
        updates = self.pipeline.finish(self.now)
        self.note(updates)
        return updates

    def step(self) -> tuple[StepPlan, list[SequenceUpdate]]:
        plan = self.plan()
        return plan, self.commit()

    def run(self, depth: int = 1) -> list[StepPlan]:
        """Steps until nothing is left, with `depth` steps in flight."""
        num_before = len(self.executor.plans)
        self.pipeline.depth = depth
        while self.scheduler.has_work:
            self.note(self.pipeline.turn(self.now) or [])
        return self.executor.plans[num_before:]

    def now(self) -> float:
        return self.now_s

    def note(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.outputs.setdefault(update.request_id, []).extend(update.tokens)
            if update.finish is not None:
                self.finished[update.request_id] = update.finish

    def is_empty(self) -> bool:
        stats = self.scheduler.stats()
        return (
            stats.num_waiting == stats.num_running == 0
            and stats.free_slots == 4
            and stats.free_pages == 100
        )


def names(plan: StepPlan) -> list[str]:
    return [chunk.request_id for chunk in plan.chunks]


def admitted(plan: StepPlan) -> list[str]:
    return [admission.request.id for admission in plan.admissions]
