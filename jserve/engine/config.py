"""The engine's own knobs. Plain data, no JAX. None means: derived from the model or the machine."""

import enum
from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types
from jserve.core.step import Program, ProgramKind

_AT_LEAST = {
    "max_model_len": 1,
    "num_pages": 1,
    "kv_bytes": 1,
    "host_pages": 0,
    "decode_steps": 1,
    "tensor_parallel": 1,
    "expert_parallel": 1,
    "num_processes": 1,
    "join_timeout_s": 0,
    "processor_rows": 1,  # or a request with masks or biases could never be admitted
    "drain_timeout_s": 0,
}


class Platform(enum.Enum):
    """A kind of device that JAX runs on."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


class KVDtype(enum.Enum):
    """A type that pages hold K and V in, by its NumPy name."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8_e4m3fn"


# `cpu` beside an accelerator lets weights be prepared in host memory.
_JAX_PLATFORMS = {Platform.CPU: "cpu", Platform.GPU: "cuda,cpu", Platform.TPU: "tpu,cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """The platform JAX runs on, decided before it starts, whatever plugins are installed."""

    backend: Platform = Platform.CPU
    chip: str | None = None  # one of engine.build.chips: the target of `jserve plan`
    xla_flags: tuple[str, ...] = ()  # added to the launcher's own for this backend

    @property
    def jax_platforms(self) -> str:
        """JAX's own setting: the first is where programs run."""
        return _JAX_PLATFORMS[self.backend]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Slots, KV memory and the short list of compiled programs."""

    num_slots: int = 32
    max_model_len: int | None = None  # prompt and output tokens of one sequence; None: the model's
    page_size: int = 16  # tokens a page; 16 on CPU, 64-128 on GPU, 128 on TPU
    num_pages: int | None = None  # None: as many as kv_bytes holds
    kv_dtype: KVDtype | None = None  # type of K and V in pages; None: the model's
    kv_bytes: int | None = 1 << 30  # KV memory; None: all that programs leave of an accelerator
    mixed_tokens: tuple[int, ...] = (128,)  # sizes of the ragged programs
    decode_rows: tuple[int, ...] = (4, 32)  # sizes of the decode programs; the last: all slots
    decode_steps: int = 8  # decode steps in one program run, at most
    # Rows that the admissions of one step share: masks or biases of a sequence take one, and a
    # history for penalties takes one or more.
    processor_rows: int = 4
    host_pages: int = 0  # KV pages that host memory holds, for moves; 0: plans move no pages
    cache_executables: bool = True  # keep compiled programs in the model cache folder
    tensor_parallel: int = 1  # devices that each hold a share of heads, FFN columns and vocabulary
    # Groups of those devices with experts of their own: tensor_parallel // expert_parallel devices
    # share the columns of each expert. Attention and dense layers still use all devices.
    expert_parallel: int = 1
    num_processes: int = 1  # processes with an equal share of the devices; the first one leads
    join_timeout_s: float = 600.0  # longest wait for the processes to find each other
    drain_timeout_s: float = 30.0  # longest wait for running requests after a stop was asked for
    step_log: str | None = None  # file to append a JSON line per step to; see docs/extending.md

    def __post_init__(self) -> None:
        check_types(self, "engine.")  # or the comparisons would fail without the name
        if self.num_slots < 2:
            raise ConfigError(f"engine.num_slots is {self.num_slots}; at least 2 are needed")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"engine.page_size is {self.page_size}; use a power of two")
        for name, sizes in (
            ("mixed_tokens", self.mixed_tokens),
            ("decode_rows", self.decode_rows),
        ):
            if not sizes or any(size < 2 for size in sizes) or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"engine.{name} is {sizes}; use ascending sizes of at least 2")
        if self.mixed_tokens[-1] <= self.num_slots:
            raise ConfigError(
                f"engine.mixed_tokens {self.mixed_tokens}: the largest must exceed num_slots "
                f"{self.num_slots}, or prompts wait while all slots decode"
            )
        for name, least in _AT_LEAST.items():
            value: float | None = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"engine.{name} is {value}; it must be at least {least}{_or_none(name)}"
                )
        for name in ("expert_parallel", "num_processes"):
            if self.tensor_parallel % (value := getattr(self, name)):
                raise ConfigError(
                    f"engine.{name} is {value}; it must divide engine.tensor_parallel, "
                    f"{self.tensor_parallel}"
                )

    @property
    def devices_per_process(self) -> int:
        """Devices that each process contributes."""
        return self.tensor_parallel // self.num_processes

    @property
    def mesh_axes(self) -> dict[str, int]:
        """Devices on each axis of the mesh, as `model.sharding` makes it."""
        experts = self.expert_parallel
        return {"model": self.tensor_parallel // experts, "expert": experts}

    def programs(self) -> tuple[Program, ...]:
        """The programs to compile; sizes beyond the slots collapse into one."""
        rows = sorted({min(size, self.num_slots) for size in (*self.decode_rows, self.num_slots)})
        return (
            *(
                Program(ProgramKind.MIXED, tokens, min(tokens, self.num_slots))
                for tokens in self.mixed_tokens
            ),
            *(Program(ProgramKind.DECODE, size, size, self.decode_steps) for size in rows),
        )


def _or_none(name: str) -> str:
    return ", or None to derive it" if name in ("max_model_len", "num_pages", "kv_bytes") else ""
