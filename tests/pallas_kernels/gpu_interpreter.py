"""JAX's Mosaic GPU interpreter, with the forms of wgmma that attention uses and it lacks.

JAX 0.10 interprets `wgmma` of two plain references only. Added here: a left operand in registers,
a transposed right one, accumulators that begin with a value (`run_state`) and `layout_cast`,
which means nothing on CPU. Operands are read through the interpreter's own memory, so that its
race detector sees the reads of `wgmma`, too.

Copies are held to what the hardware does: it moves whole tiles of tiled shared memory, so that
rows of a copy that begins inside one would be zeros. The interpreter knows nothing of tiles.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import core as jax_core
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax._src.state import discharge, indexing
from jax._src.state import types as state_types

# This module replaces private parts of JAX, which differ from version to version.
needs_gpu_interpreter = pytest.mark.skipif(
    not jax.__version__.startswith("0.10."),
    reason=f"{Path(__file__).name} knows jax._src of JAX 0.10, not of {jax.__version__}",
)

mlir.register_lowering(gpu_core.layout_cast_p, lambda ctx, x, *, new_layout: [x], platform="cpu")


# NumPy needs no compilation; it must give the same bits.
_PLAIN = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "clamp": lambda low, value, high: np.clip(value, low, high),
    "convert_element_type": lambda value: value,
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]),
}


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    """Runs a jaxpr operation by operation: the interpreter would compile it for every thread."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jax_core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        outs = _operation(eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _operation(eqn: Any, values: list[Any]) -> Any:
    params = eqn.params
    match eqn.primitive.name:
        case "io_callback":
            return params["callback"](*values)
        case "cond":
            branch = params["branches"][int(np.clip(values[0], 0, len(params["branches"]) - 1))]
            return _evaluate(branch.jaxpr, branch.consts, *values[1:])
        case "while":
            cond, body = params["cond_jaxpr"], params["body_jaxpr"]
            split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            outer, inner, carry = (
                values[: split[0]],
                values[split[0] : split[1]],
                values[split[1] :],
            )
            while _evaluate(cond.jaxpr, cond.consts, *outer, *carry)[0]:
                carry = _evaluate(body.jaxpr, body.consts, *inner, *carry)
            return carry
        case "scan":
            body, fixed = params["jaxpr"], params["num_consts"]
            assert len(values) == fixed + params["num_carry"]
            carry = values[fixed:]
            for _ in range(params["length"]):
                carry = _evaluate(body.jaxpr, body.consts, *values[:fixed], *carry)
            return carry
        case "layout_cast":
            return values
        case "multiple_of":
            divisors = params["values"]
            for divisor in divisors if isinstance(divisors, tuple | list) else (divisors,):
                assert int(values[0]) % divisor == 0, f"{values[0]} is no multiple of {divisor}"
            return values
        case "jit" | "pjit" | "closed_call":
            inner = params["jaxpr"]
            return _evaluate(inner.jaxpr, inner.consts, *values)
    if eqn.primitive.name in _PLAIN:
        found = _PLAIN[eqn.primitive.name](*(np.asarray(value) for value in values))
        return [np.asarray(found).astype(eqn.outvars[0].aval.dtype, copy=False)]
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return out if eqn.primitive.multiple_results else [out]


def _thread(jaxpr: Any, consts: Any, *args: Any) -> None:
    """Runs one warpgroup, whose failure must not leave the others waiting for ever."""
    try:
        _evaluate(jaxpr, consts, *args)
    except BaseException:
        for barrier in list(gpu_callbacks._get_shared_memory().mem.values()):
            if isinstance(barrier, shared_memory.Barrier):
                with barrier.cv:
                    barrier.phase = sys.maxsize
                    barrier.cv.notify_all()
        raise


class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    def interpret(self, jaxpr: Any, token: Any, *args: Any) -> Any:
        env = interpret_utils.JaxprEnv(vars=jaxpr.constvars + jaxpr.invars, values=args)
        for eqn in jaxpr.eqns:
            match eqn.primitive:
                case discharge.run_state_p:
                    token, out = self._run_state(eqn, token, env.read_many(eqn.invars))
                case gpu_primitives.wgmma_ref_p:
                    token, out = self._wgmma(eqn, token, env.read_many(eqn.invars)), []
                case _:
                    names = [v for v in eqn.invars if not isinstance(v, jax_core.Literal)]
                    names = list(dict.fromkeys(names))
                    one = jaxpr.replace(
                        constvars=[],
                        invars=names,
                        outvars=eqn.outvars,
                        eqns=[eqn],
                        debug_info=jaxpr.debug_info.with_unknown_names(),
                    )
                    token, out = super().interpret(one, token, *env.read_many(names))
            env.write_many(eqn.outvars, out)
        return token, env.read_many(jaxpr.outvars)

    def _place(self) -> dict[str, Any]:
        return {
            "device_id": jnp.int32(self.device_info.device_id),
            "grid_point_coords": self.grid_point_coords,
            "thread_id": self.thread_id,
        }

    def _get(self, token: Any, key: Any, shape: Any, transforms: tuple[Any, ...] = ()) -> Any:
        return gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=shape,
            allocation_key_as_array=key,
            transforms=transforms,
            **self._place(),
        )

    def _set(self, token: Any, key: Any, value: Any, transforms: tuple[Any, ...]) -> Any:
        return gpu_callbacks.call_swap(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
            allocation_key_as_array=key,
            transforms=transforms,
            val=value,
            mask=None,
            **self._place(),
        )[0]

    def _interpret_swap_p(self, eqn: Any, token: Any, get_invals: Any) -> Any:
        """A store through a transposed reference stores the transpose."""
        ref, value, *leaves = get_invals()
        transforms = jax.tree.unflatten(eqn.params["tree"], leaves)
        turned = [isinstance(one, state_types.TransposeTransform) for one in transforms]
        if not any(turned):
            return super()._interpret_swap_p(eqn, token, get_invals)
        token, old = gpu_callbacks.call_swap(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(value.T.shape, value.dtype),
            allocation_key_as_array=ref,
            transforms=transforms[: turned.index(True)],  # then the whole of it is stored
            val=value.T,
            mask=None,
            **self._place(),
        )
        return token, old.T

    def _run_state(self, eqn: Any, token: Any, values: list[Any]) -> Any:
        """Accumulators with a first value: made in registers, run, read."""
        keys, jaxpr = [], eqn.params["jaxpr"]
        outer = [isinstance(var.aval, state_types.AbstractRef) for var in eqn.invars]
        for is_outer, value in zip(outer, values, strict=True):
            if is_outer:
                keys.append(value)
                continue
            token, request = gpu_callbacks.call_make_allocation_request_array(
                token=token,
                device_id=jnp.int32(self.device_info.device_id),
                memory_space_id=gpu_callbacks.get_memory_space_idx(gpu_core.MemorySpace.REGS),
                thread_id=self.thread_id,
                initial_ref_count=1,
            )
            token, key = gpu_callbacks.call_allocate_buffer(
                token=token,
                allocation_request_as_array=request,
                value=value,
                **self._place(),
            )
            keys.append(key)
        token, _ = self.interpret(jaxpr, token, *keys)
        outs = []
        for is_outer, key, value in zip(outer, keys, values, strict=True):
            if not is_outer:
                shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
                token, value = self._get(token, key, shape)
            outs.append(value)
        return token, outs

    def _operand(self, token: Any, var: Any, value: Any, transforms: Any) -> Any:
        if not isinstance(var.aval, state_types.AbstractRef):
            return token, value
        transposed = transforms and isinstance(transforms[-1], state_types.TransposeTransform)
        transforms = transforms[:-1] if transposed else transforms
        aval = state_types.TransformedRef(var.aval, transforms).type
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        token, found = self._get(token, value, shape, transforms)
        return token, found.T if transposed else found

    def _wgmma(self, eqn: Any, token: Any, values: list[Any]) -> Any:
        acc, a, b, *leaves = values
        none = jax.tree.structure([])
        names = ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
        trees = tuple(none if eqn.params[name] is None else eqn.params[name] for name in names)
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        aval = state_types.TransformedRef(eqn.invars[0].aval, transforms[0]).type
        token, a = self._operand(token, eqn.invars[1], a, transforms[1])
        token, b = self._operand(token, eqn.invars[2], b, transforms[2])
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        token, old = self._get(token, acc, shape, transforms[0])
        added = jnp.dot(
            a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return self._set(token, acc, old + added, transforms[0])


def _begin(transforms: tuple[Any, ...], number: int) -> list[int]:
    """Start of a view of a reference in its last `number` axes."""
    axes: list[int] | None = None
    for transform in transforms:
        if not isinstance(transform, indexing.NDIndexer):
            assert not isinstance(transform, state_types.TransposeTransform)
            continue
        axes = [0] * len(transform.indices) if axes is None else axes
        kept = []
        for before, index in zip(axes, transform.indices, strict=True):
            if isinstance(index, indexing.Slice):
                assert index.stride == 1
                kept.append(before + int(index.start))
        axes = kept
    return [0] * number if axes is None else axes[-number:]


def _whole_tiles(copy: Any) -> Any:
    """Makes a copy refuse a view that begins inside a tile of shared memory."""

    def checked(*, src_transforms: Any, dst_transforms: Any, **others: Any) -> Any:
        both = src_transforms, dst_transforms
        for tiled in (one for side in both for one in side):
            if not isinstance(tiled, gpu_core.UntilingTransform):
                continue
            for begin in (_begin(side, len(tiled.tiling)) for side in both):
                inside = [at % size for at, size in zip(begin, tiled.tiling, strict=True)]
                assert not any(inside), f"a copy begins at {begin}, inside a tile {tiled.tiling}"
        return copy(src_transforms=src_transforms, dst_transforms=dst_transforms, **others)

    return checked


_COPIES = ("_execute_device_local_memory_transfer", "copy_smem_to_gmem")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """GPU kernels that are traced inside run on CPU; afterwards no race may have been found."""
    stock = jaxpr_interpret.JaxprInterpreter, thread_map._run_jaxpr
    copies = {name: getattr(gpu_callbacks, name) for name in _COPIES}
    jaxpr_interpret.JaxprInterpreter, thread_map._run_jaxpr = _Interpreter, _thread
    for name, copy in copies.items():
        setattr(gpu_callbacks, name, _whole_tiles(copy))
    interpreter.reset_gpu_interpret_mode_state()
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
            yield
    finally:
        jaxpr_interpret.JaxprInterpreter, thread_map._run_jaxpr = stock
        for name, copy in copies.items():
            setattr(gpu_callbacks, name, copy)
    races = interpreter.get_races()
    assert races is None or not races.races_found
