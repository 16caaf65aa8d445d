"""Configs are typed: what is wrong is said with the field's name and what it could be."""

import dataclasses
import enum
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jserve.checkpoints.config import Dtype, Quantization
from jserve.config import ServeConfig, flatten, load, override
from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types
from jserve.core.logs import LogFormat

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny_random.py")


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    count: int = 1
    share: float = 0.5
    name: str = "x"
    on: bool = False
    colour: Colour = Colour.RED
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


def _set(assignment: str) -> Inner:
    return override(Outer(), [assignment]).inner  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("inner.count=7", Inner(count=7)),
        ("inner.count=0x10", Inner(count=16)),
        ("inner.count = 1_000", Inner(count=1000)),
        ("inner.share=1e-3", Inner(share=0.001)),
        ("inner.share=2", Inner(share=2.0)),
        ("inner.name=a=b", Inner(name="a=b")),
        ("inner.name=", Inner(name="")),
        ("inner.on=True", Inner(on=True)),
        ("inner.sizes=", Inner(sizes=())),
        ("inner.sizes=(8, 16,32)", Inner(sizes=(8, 16, 32))),
        ("inner.pair=3,b", Inner(pair=(3, "b"))),
        ("inner.limit=5", Inner(limit=5)),
        ("inner.limit=none", Inner(limit=None)),
        ("inner.colour=red", Inner(colour=Colour.RED)),
    ],
)
def test_override_parses_by_the_type_of_the_field(assignment: str, expected: Inner) -> None:
    made = _set(assignment)
    assert made == expected
    assert [type(value) for value in dataclasses.astuple(made)] == [
        type(value) for value in dataclasses.astuple(expected)
    ]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.counts=7", r"Inner has no field 'counts'; it has count, share, name"),
        ("other=1", r"Outer has no field 'other'; it has inner"),
        ("inner=1", r"name one of its fields: inner\.count, inner\.share"),
        ("inner.count.x=1", r"count has no fields"),
        ("inner.count", r"write section\.field=value"),
        ("inner.count=many", r"inner\.count=many: not of type int"),
        ("inner.count=1.5", r"not of type int"),
        ("inner.on=1", r"write true or false"),
        ("inner.colour=blue", r"one of red"),
        ("inner.pair=1", r"2 items are needed"),
        ("inner.sizes=1,x", r"not of type tuple\[int, \.\.\.\]"),
    ],
)
def test_wrong_override_says_what_would_be_right(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _set(assignment)


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (Inner(count="7"), r"inner\.count is '7', but must be of type int"),  # type: ignore[arg-type]
        (Inner(count=True), r"inner\.count"),
        (Inner(sizes=[1, 2]), r"inner\.sizes"),  # type: ignore[arg-type]
        (Inner(sizes=(1, "2")), r"inner\.sizes"),  # type: ignore[arg-type]
        (Inner(name=None), r"inner\.name"),  # type: ignore[arg-type]
        (Inner(limit="x"), r"inner\.limit"),  # type: ignore[arg-type]
    ],
)
def test_wrong_type_in_a_config_is_found(inner: Inner, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        check_types(Outer(inner))


def test_every_config_of_the_repository_loads() -> None:
    names = [path.name for path in sorted(CONFIGS.glob("*.py"))]
    assert "smollm2_135m.py" in names
    for name in [*names, "llama31_8b.py:v5e-8"]:
        config = load(str(CONFIGS / name))
        assert pickle.loads(pickle.dumps(config)) == config


def test_load_applies_overrides_in_order() -> None:
    config = load(TINY, ["engine.num_slots=4", "log.format=json", "engine.num_slots=6"])
    assert config.engine.num_slots == 6
    assert config.log.format is LogFormat.JSON
    assert load(TINY, ["gateway.api_keys=a,b"]).gateway.api_keys == ("a", "b")


def test_states_are_set_by_value_and_named_in_files(tmp_path: Path) -> None:
    model = load(TINY, ["model.quantization=int4", "model.dtype=bfloat16"]).model
    assert (model.quantization, model.dtype) == (Quantization.INT4, Dtype.BFLOAT16)
    with pytest.raises(ConfigError, match="one of none, int4, int8, int8_channel, fp8"):
        load(TINY, ["model.quantization=int3"])
    for field_, enum_ in (("quantization", "Quantization"), ("dtype", "Dtype")):
        body = (
            "from jserve.checkpoints.config import ModelConfig\n"
            f"def get_config(): return ModelConfig(name='x', source='y', {field_}='int4')\n"
        )
        message = f"model.{field_} is 'int4'; write jserve.checkpoints.config.{enum_}.NAME, one of "
        with pytest.raises(ConfigError, match=message):
            load(_file(tmp_path, body))


def test_a_source_of_several_types_can_be_set_to_a_path() -> None:
    assert load(TINY, ["model.source=/models/x.gguf"]).model.source == "/models/x.gguf"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "name", ["scheduler.decode_wait_s", "engine.join_timeout_s", "gateway.drain_s"]
)
def test_a_limit_that_is_not_finite_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {value}\b.*finite"):
        load(TINY, [f"{name}={value}"])


def test_a_value_out_of_range_is_refused_by_its_own_package() -> None:
    with pytest.raises(ConfigError, match="num_slots"):
        load(TINY, ["engine.num_slots=0"])


def _file(folder: Path, body: str) -> str:
    path = folder / "config.py"
    path.write_text(body)
    return str(path)


def test_wrong_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(str(tmp_path / "nothing.py"))
    with pytest.raises(ConfigError, match=r"defines no get_config\(\)"):
        load(_file(tmp_path, "x = 1"))
    with pytest.raises(ConfigError, match="returned int, not ServeConfig"):
        load(_file(tmp_path, "def get_config(): return 1"))
    with pytest.raises(ConfigError, match="no variant 'npu'"):
        load(str(CONFIGS / "llama31_8b.py:npu"))


def test_unknown_field_in_a_file_lists_the_fields(tmp_path: Path) -> None:
    body = (
        "from jserve.engine.config import EngineConfig\n"
        "def get_config(): return EngineConfig(slots=3)\n"
    )
    with pytest.raises(ConfigError, match=r"'slots'; its fields are num_slots, "):
        load(_file(tmp_path, body))


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("engine", "window_rows", "decode_rows"),
        ("engine", "window_steps", "decode_steps"),
        ("scheduler", "window_steps", "decode_steps"),
        ("scheduler", "window_wait_s", "decode_wait_s"),
    ],
)
def test_a_renamed_field_is_told_its_new_name(
    tmp_path: Path, section: str, old: str, new: str
) -> None:
    with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
        load(TINY, [f"{section}.{old}=4"])
    name = f"{section.capitalize()}Config"
    body = f"from jserve.{section}.config import {name}\ndef get_config(): return {name}({old}=4)\n"
    with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
        load(_file(tmp_path, body))


HEAD = """import dataclasses
from jserve.checkpoints.config import ModelConfig
from jserve.config import ServeConfig, load
from jserve.engine.config import EngineConfig
from jserve.scheduler.config import SchedulerConfig
MODEL = ModelConfig(name="x", source="x")
def get_config(): return dataclasses.replace(ServeConfig(model=MODEL), **changes())
"""
RENAMED = "window_rows is now called decode_rows"


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("ENGINE = EngineConfig(window_rows=(4, 32))", 8, RENAMED),
        ("def changes(): return ServeConfig(model=MODEL).engine.window_rows", 8, RENAMED),
        ("def changes(): ServeConfig(model=MODEL).engine.window_rows = (4,)", 8, RENAMED),
        ("def changes():\n  dataclasses.replace(EngineConfig(), window_rows=(4,))", 9, RENAMED),
        (
            "def changes(): EngineConfig().num_slots = 4",
            8,
            r"EngineConfig\.num_slots cannot be assigned; give it to the constructor",
        ),
        ("def changes(: pass", 8, "SyntaxError: "),
        ("import nothing_of_this_name", 8, "ModuleNotFoundError: No module named 'nothing"),
        ("def changes(): return {}['key']", 8, "KeyError: 'key'"),
        ("EngineConfig(num_slots=1)", 8, "engine.num_slots is 1; at least 2"),
        ("load('nothing.py')", 8, "there is no file nothing.py"),
    ],
)
def test_an_error_while_a_file_runs_names_its_line(
    tmp_path: Path, body: str, line: int, message: str
) -> None:
    path = _file(tmp_path, HEAD + body)
    with pytest.raises(ConfigError, match=f"^{path}:{line}: .*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("EngineConfig(num_slots='8')", "engine.num_slots is '8', but must be of type int"),
        ("EngineConfig(page_size=None)", "engine.page_size is None, but must be of type int"),
        ("EngineConfig(decode_rows='4')", "engine.decode_rows is '4', but must be of type tuple"),
        ("EngineConfig(host_pages='4')", "engine.host_pages is '4', but must be"),
        ("SchedulerConfig(max_queue='8')", "scheduler.max_queue is '8', but must be of type int"),
        ("SchedulerConfig(max_queue=None)", "scheduler.max_queue is None, but must be"),
    ],
)
def test_a_value_of_a_wrong_type_is_found_before_it_is_compared(
    tmp_path: Path, call: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(_file(tmp_path, HEAD + call))


def test_flatten_names_every_leaf() -> None:
    config = load(TINY)
    leaves = flatten(config)
    assert leaves["engine.num_slots"] == config.engine.num_slots
    assert leaves["model.source.spec.layers"] == 2
    sections = {name.split(".")[0] for name in leaves}
    assert sections == {item.name for item in dataclasses.fields(ServeConfig)}
