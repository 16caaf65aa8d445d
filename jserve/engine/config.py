"""The engine's own knobs. Plain data, no JAX."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.step import Program, ProgramKind

_AT_LEAST = {
    "max_model_len": 0,
    "num_pages": 0,
    "kv_bytes": 0,
    "decode_steps": 1,
    "tensor_parallel": 1,
    "expert_parallel": 1,
    "num_processes": 1,
    "join_timeout_s": 0,
    "processor_rows": 1,  # or a request with a mask could never be admitted
    "drain_timeout_s": 0,
}
_KV_DTYPES = ("", "float32", "bfloat16", "float8_e4m3fn")

# `cpu` beside an accelerator lets weights be prepared in host memory.
_JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """What JAX runs on, decided before it starts, whatever plugins are installed."""

    backend: str = "cpu"  # cpu, gpu or tpu
    chip: str = ""  # that the config was made for, see engine.build.chips; for `jserve plan`
    xla_flags: tuple[str, ...] = ()  # added to the launcher's own for this backend

    def __post_init__(self) -> None:
        """Raises ConfigError if `backend` is unknown."""
        if self.backend not in _JAX_PLATFORMS:
            raise ConfigError(
                f"platform.backend is {self.backend!r}; use one of {', '.join(_JAX_PLATFORMS)}"
            )

    @property
    def jax_platforms(self) -> str:
        """JAX's own setting: the first is where programs run."""
        return _JAX_PLATFORMS[self.backend]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Slots, KV memory and the short list of compiled programs."""

    num_slots: int = 32
    max_model_len: int = 0  # prompt and output tokens of one sequence; 0: the model's own limit
    page_size: int = 16  # tokens a page; 16 on CPU, 64-128 on GPU, 128 on TPU
    num_pages: int = 0  # 0: what kv_bytes holds
    kv_dtype: str = ""  # of K and V in pages: float32, bfloat16, float8_e4m3fn; empty: the model's
    kv_bytes: int = 1 << 30  # KV memory; on accelerators 0 takes what the programs leave
    mixed_tokens: tuple[int, ...] = (128,)  # sizes of the ragged programs
    decode_rows: tuple[int, ...] = (4, 32)  # sizes of the decode programs; the last: all slots
    decode_steps: int = 8  # decode steps in one program run, at most
    processor_rows: int = 4  # sequences with masks or biases admitted in one step
    cache_executables: bool = True  # keep compiled programs in the model cache folder
    tensor_parallel: int = 1  # devices that each hold a share of heads, FFN columns and vocabulary
    # Of those, devices with experts of their own: attention and dense layers still use all of
    # them; tensor_parallel // expert_parallel devices share the columns of each expert.
    expert_parallel: int = 1
    num_processes: int = 1  # that the devices belong to, as many to each; the first one leads
    join_timeout_s: float = 600.0  # what the processes may take to find each other
    drain_timeout_s: float = 30.0  # what runs may take after a stop was asked for
    step_log: str | None = None  # file to append a JSON line per step to; see docs/extending.md

    def __post_init__(self) -> None:
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
        if self.kv_dtype not in _KV_DTYPES:
            raise ConfigError(
                f"engine.kv_dtype is {self.kv_dtype!r}; it must be one of {list(_KV_DTYPES)}"
            )
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"engine.{name} is {getattr(self, name)}; it must be at least {least}"
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
