"""The copy programs work in the memory they are given, whatever the devices."""

import jax
import numpy as np
import pytest

from jserve.core.errors import EngineError
from jserve.core.step import Move, MoveKind
from jserve.engine.program.page_mover import PageMover
from jserve.engine.program.page_moves import (
    MAX_PAYLOADS,
    MOVE_SIZES,
    MoveProgram,
    compile_moves,
    lower_move,
)
from jserve.model.sharding import device_mesh, named_sharding

pytestmark = pytest.mark.optimized

SHAPE = (600, 2, 4, 16, 32)  # pages of one layer: 16 KiB a page
LAYERS = 3
OUT, IN, COPY = MoveKind


def pages(devices: int) -> tuple[jax.Array, ...]:
    mesh = device_mesh(jax.devices()[:devices], model=devices, expert=1)
    heads = named_sharding(mesh, (None, None, "kv_heads", None, None))
    size = int(np.prod(SHAPE))
    return tuple(
        jax.device_put(np.arange(n, n + size, dtype=np.float32).reshape(SHAPE), heads)
        for n in range(LAYERS)
    )


@pytest.mark.parametrize("kind", MoveKind)
@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_as_large_as_a_payload_is_copied(kind: MoveKind, devices: int) -> None:
    layers = pages(devices)
    page_bytes = sum(layer.nbytes for layer in layers) // SHAPE[0] // devices
    for size in MOVE_SIZES:
        memory = lower_move(MoveProgram(kind, 0, size), layers).compile().memory_analysis()
        # A copy on the device holds the page it has read; the others hold nothing.
        room = page_bytes if kind is COPY else 0
        assert memory.temp_size_in_bytes < room + 8 * 1024 < 2 * page_bytes
        if kind is OUT:
            assert memory.output_size_in_bytes < (size + 1) * page_bytes
        else:  # in place
            assert memory.alias_size_in_bytes == SHAPE[0] * page_bytes


@pytest.mark.parametrize("devices", [1, 2])
def test_moves_run_in_order_and_copy_values(devices: int) -> None:
    kv = (pages(devices),)
    before = [np.asarray(layer) for layer in kv[0]]
    mover = PageMover(compile_moves(kv, None), kv, num_host_pages=50)
    moves = [
        *(Move(OUT, 0, 10 + n, 49 - n) for n in range(41)),
        Move(COPY, 0, 5, 10),  # over a page that has just left
        Move(COPY, 0, 10, 11),
    ]
    kv = mover.run(kv, moves)
    assert mover.num_out == 2  # moves of 32 and 9 pages
    assert mover.land(1) == tuple(49 - n for n in range(32))
    assert mover.land(mover.num_out) == tuple(49 - n for n in range(32, 41))
    assert mover.land(mover.num_out) == ()
    kv = mover.run(kv, [Move(IN, 0, 49 - n, 100 + n) for n in range(41)])
    for layer, was in zip(kv[0], before, strict=True):
        now = np.asarray(layer)
        np.testing.assert_array_equal(now[100:141], was[10:51])
        np.testing.assert_array_equal(now[10:12], was[[5, 5]])
        np.testing.assert_array_equal(now[141:], was[141:])


def test_moves_of_one_kind_stay_in_the_memory_of_their_group() -> None:
    first = pages(1)
    second = tuple(-layer for layer in first)
    before = [np.asarray(group[0]) for group in (first, second)]
    kv = (first, second)
    mover = PageMover(compile_moves(kv, None), kv, num_host_pages=2)
    kv = mover.run(
        kv,
        [
            *(Move(COPY, group, 5 + group, 10 + group) for group in range(2)),
            *(Move(OUT, group, 7, group) for group in range(2)),
            *(Move(IN, group, group, 20 + group) for group in range(2)),
        ],
    )
    for group, was in enumerate(before):
        expected = was.copy()
        expected[10 + group], expected[20 + group] = was[5 + group], was[7]
        np.testing.assert_array_equal(np.asarray(kv[group][0]), expected)


def test_a_page_on_its_way_is_awaited_and_one_that_never_left_is_an_error() -> None:
    kv = (pages(1),)
    mover = PageMover(compile_moves(kv, None), kv, num_host_pages=4)
    kv = mover.run(kv, [Move(OUT, 0, 7, 2)])
    kv = mover.run(kv, [Move(IN, 0, 2, 8)])
    np.testing.assert_array_equal(kv[0][1][8], kv[0][1][7])
    assert mover.land(mover.num_out) == (2,)
    with pytest.raises(EngineError, match="host page 3 is to be copied in, but was never written"):
        mover.run(kv, [Move(IN, 0, 3, 8)])


class Watched:
    """A result of an IN run that tells how many were not waited for."""

    num_running = 0

    def __init__(self) -> None:
        Watched.num_running += 1

    def block_until_ready(self) -> None:
        Watched.num_running -= 1


def test_few_payloads_lie_on_the_device_at_once() -> None:
    """The bound holds for any number of pages that a plan swaps out and in."""
    kv = (pages(1),)
    live: list[int] = []
    arriving: list[int] = []

    def watched(program: MoveProgram, call):
        def run(*arguments):
            shape = (program.size, *SHAPE[1:])
            arrays = [array for array in jax.live_arrays() if array.shape == shape]
            buffers = {array.unsafe_buffer_pointer() for array in arrays}
            live.append(len(buffers) // LAYERS + (program.kind is OUT))
            if program.kind is OUT:
                return call(*arguments)
            arriving.append(Watched.num_running + 1)
            return call(*arguments)[0], Watched()

        return run

    programs = {
        program: watched(program, call) for program, call in compile_moves(kv, None).items()
    }
    mover = PageMover(programs, kv, num_host_pages=320)
    before = np.asarray(kv[0][0])
    kv = mover.run(kv, [Move(OUT, 0, 1 + n, n) for n in range(320)])
    assert len(live) == mover.num_out == 10
    assert max(live) == MAX_PAYLOADS
    kv = mover.run(kv, [Move(IN, 0, n, 599 - n) for n in range(160)])
    assert max(arriving) <= MAX_PAYLOADS
    assert len(arriving) == 5
    assert max(live) == MAX_PAYLOADS
    assert sorted(mover.land(mover.num_out)) == list(range(320))
    np.testing.assert_array_equal(np.asarray(kv[0][0])[440:], before[160:0:-1])
