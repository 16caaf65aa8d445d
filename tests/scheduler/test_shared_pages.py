"""Random plans with shared, cached and moved pages: the simulated device accepts every right one.

The plans are this drill's own, one step at a time, so that the contract is used in ways that the
scheduler does not: it shares pages of prompts and outputs, copies a page of which it can use a
part, and moves sequences out and in.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from jserve.core.request import Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    Move,
    MoveKind,
    NewPages,
    Program,
    ProgramKind,
    StepPlan,
)
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

MODEL = SimulatedModel(vocab=8, eos_token_ids=(1,))
SLOTS, PAGES, SIZE, HOST_PAGES, MAX_LEN = 4, 40, 3, 24, 40
MIXED, DECODE = Program(ProgramKind.MIXED, 24, SLOTS), Program(ProgramKind.DECODE, SLOTS, SLOTS, 4)


@dataclass(eq=False)
class Live:
    """A sequence with a slot, or one that waits."""

    request: Request
    output: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_sent: int = 0  # pages that the device was told of
    num_computed: int = 0
    host: list[int] = field(default_factory=list)  # pages on the host, in order
    decodes: bool = False  # its last token is on the device, all others are computed

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.output)


class PageDrill:
    """A small scheduler of random taste, one step at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.executor = SimulatedExecutor(
            (MIXED, DECODE),
            num_slots=SLOTS,
            num_pages=PAGES,
            page_size=SIZE,
            model=MODEL,
            pages_per_slot=-(-MAX_LEN // SIZE),
            num_host_pages=HOST_PAGES,
        )
        self.running: list[Live] = []
        self.waiting: deque[Live] = deque()
        self.refs = Counter[int]()
        self.index: dict[tuple[int, ...], int] = {}  # tokens up to the end of a full page
        self.key_of: dict[int, tuple[int, ...]] = {}
        self.free_host = list(range(HOST_PAGES))
        self.landed: set[int] = set()
        self.abandoned: set[int] = set()  # host pages to free once they have landed
        self.step = 0
        self.num_ops = 0
        self.seen = Counter[str]()
        self.moves: list[Move] = []
        self.admissions: list[Admission] = []

    def run(self, num_ops: int) -> None:
        while self.num_ops < num_ops:
            self.moves, self.admissions = [], []
            if len(self.waiting) < 4:
                self.waiting.append(self.new())
            if len(self.running) > 1 and self.random.random() < 0.15:
                self.preempt(self.random.choice(self.running))
            for _ in range(2):
                if self.waiting and len(self.running) < SLOTS and self.random.random() < 0.6:
                    self.admit(self.waiting[0])
            if self.running:
                self.run_step()

    def new(self) -> Live:
        pick = self.random
        shared = random.Random(pick.randrange(4))  # a few prompts begin alike
        prompt = [shared.randrange(2, 8) for _ in range(pick.randrange(1, 20))]
        prompt += [pick.randrange(2, 8) for _ in range(pick.randrange(0, 4))]
        sampling = SamplingParams(max_tokens=pick.randrange(1, 16), seed=pick.randrange(3))
        self.num_ops += 1
        return Live(Request(id=f"r{self.num_ops}", prompt=tuple(prompt), sampling=sampling))

    # Memory.

    def take(self) -> int:
        """A free page, or a cached one, whose content is forgotten; never one in use."""
        unused = [page for page in range(1, PAGES + 1) if not self.refs[page]]
        blank = [page for page in unused if page not in self.key_of]
        page = self.random.choice(blank or unused)
        if key := self.key_of.pop(page, None):
            del self.index[key]
            self.seen["evicted"] += 1
        self.refs[page] = 1
        return page

    def num_unused(self) -> int:
        return PAGES - sum(count > 0 for count in self.refs.values())

    def publish(self, live: Live) -> None:
        for n in range(live.num_computed // SIZE):
            key = live.context[: (n + 1) * SIZE]
            if key not in self.index and live.pages[n] not in self.key_of:
                self.index[key] = live.pages[n]
                self.key_of[live.pages[n]] = key

    def release(self, live: Live) -> None:
        for page in live.pages:
            self.refs[page] -= 1
        live.pages, live.num_sent = [], 0

    def preempt(self, live: Live) -> None:
        self.running.remove(live)
        self.waiting.appendleft(live)
        held = -(-live.num_computed // SIZE)
        if 0 < held <= len(self.free_host) and self.random.random() < 0.7:
            live.host = [self.free_host.pop() for _ in range(held)]
            self.moves += [
                Move(MoveKind.OUT, 0, page, host)
                for page, host in zip(live.pages, live.host, strict=False)
            ]
            self.seen["out"] += 1
        else:
            live.num_computed = 0
        self.release(live)

    # Starts.

    def admit(self, live: Live) -> None:
        if live.host and not self.landed.issuperset(live.host):
            return
        if self.num_unused() < -(-len(live.context) // SIZE) + 2 * SLOTS:
            return
        self.waiting.remove(live)
        taken = {other.slot for other in self.running}
        live.slot = next(slot for slot in range(SLOTS) if slot not in taken)
        if live.host and self.random.random() < 0.9:
            self.move_in(live)
        else:
            self.drop_host(live)
            self.hit(live)
        live.decodes = bool(live.output) and live.num_computed == len(live.context) - 1
        last = live.output[-1] if live.decodes else None
        self.seen["decode start"] += last is not None
        self.running.append(live)
        self.num_ops += 1
        self.admissions.append(
            Admission(live.slot, live.request, tuple(live.output), live.num_computed, last)
        )

    def move_in(self, live: Live) -> None:
        live.pages = [self.take() for _ in live.host]
        self.moves += [
            Move(MoveKind.IN, 0, host, page)
            for host, page in zip(live.host, live.pages, strict=True)
        ]
        self.seen["in"] += 1
        self.free(live.host)
        live.host = []

    def drop_host(self, live: Live) -> None:
        self.free(live.host)
        live.host, live.num_computed = [], 0

    def free(self, host_pages: list[int]) -> None:
        self.landed.difference_update(host_pages)
        self.free_host += host_pages

    def hit(self, live: Live) -> None:
        context, most = live.context, (len(live.context) - 1) // SIZE
        while len(live.pages) < most:
            page = self.index.get(context[: (len(live.pages) + 1) * SIZE])
            if page is None:
                break
            self.refs[page] += 1
            live.pages.append(page)
        live.num_computed = len(live.pages) * SIZE
        self.seen["hit"] += bool(live.pages)
        # A cached page that begins with the next tokens is copied, and written on.
        rest = context[live.num_computed : len(context) - 1]
        for key, page in self.index.items():
            start = key[live.num_computed :]
            if key[: live.num_computed] == context[: live.num_computed] and len(start) == SIZE:
                same = next((i for i in range(SIZE) if rest[i : i + 1] != start[i : i + 1]), SIZE)
                if 0 < same < SIZE:
                    self.refs[page] += 1  # until the copy is planned
                    own = self.take()
                    self.refs[page] -= 1
                    self.moves.append(Move(MoveKind.COPY, 0, page, own))
                    live.pages.append(own)
                    live.num_computed += same
                    self.seen["copy"] += 1
                    break

    # Steps.

    def run_step(self) -> None:
        decodes = [live for live in self.running if live.decodes]
        prompts = [live for live in self.running if not live.decodes]
        steps = 1
        if not prompts and not self.admissions:
            steps = self.random.randrange(1, 5)
        left = MIXED.tokens - len(decodes)
        chunks: list[Chunk] = []
        for live in decodes:
            asked = live.request.sampling.max_tokens - len(live.output)
            most = min(steps, asked)
            chunks.append(self.chunk(live, 1, (), most, live.num_computed + most))
        rows = list(decodes)
        for n, live in enumerate(prompts):
            missing = len(live.context) - live.num_computed
            count = self.random.randrange(1, min(missing, left - len(prompts) + n + 1) + 1)
            left -= count
            end = live.num_computed + count
            tokens = live.context[live.num_computed : end]
            chunks.append(self.chunk(live, count, tokens, int(count == missing), end))
            rows.append(live)
        program = DECODE if not prompts and not self.admissions else MIXED
        plan = StepPlan(
            self.step, program, steps, tuple(chunks), tuple(self.admissions), tuple(self.moves)
        )
        self.step += 1
        self.num_ops += len(plan.chunks) + len(plan.moves)
        result = self.executor.collect(self.executor.submit(plan))
        self.landed.update(result.landed)
        for row, (live, chunk) in enumerate(zip(rows, chunks, strict=True)):
            new = result.tokens[row, : result.num_new[row]].tolist()
            live.num_computed += len(new) if not chunk.tokens else chunk.num_tokens
            live.output += new
            live.decodes = chunk.max_new > 0
            self.publish(live)
            if result.finish[row]:
                assert live.output == MODEL.generate(live.request, 1000)[0]
                self.running.remove(live)
                self.release(live)
                self.seen["done"] += 1

    def chunk(
        self, live: Live, count: int, tokens: tuple[int, ...], max_new: int, end: int
    ) -> Chunk:
        while len(live.pages) * SIZE < end:
            live.pages.append(self.take())
        new = tuple(live.pages[live.num_sent :])
        pages = (NewPages(0, live.num_sent, new),) if new else ()
        live.num_sent = len(live.pages)
        return Chunk(
            live.slot, live.request.id, live.num_computed, count, tokens, max_new, (), pages
        )


@pytest.mark.parametrize(
    "num_ops",
    [10_000, pytest.param(100_000, marks=pytest.mark.sweep)],
)
def test_random_shared_cached_and_moved_pages(num_ops: int) -> None:
    drill = PageDrill(seed=num_ops)
    drill.run(num_ops)
    for event in ("hit", "copy", "out", "in", "decode start", "evicted", "done"):
        assert drill.seen[event] > num_ops // 1000, event
