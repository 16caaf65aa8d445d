"""Fields of an engine job that all processes of an engine must share, and the others."""

import pytest

from jserve.config import flatten, load
from jserve.launch import jobs
from jserve.launch.jobs import engine_job

TINY = "configs/tiny_random.py"


@pytest.mark.parametrize(
    "setting",
    [
        "engine.step_log=steps.jsonl",
        "engine.drain_timeout_s=1",
        "engine.join_timeout_s=1",
        "model.cache_dir=/cache",
        "log.level=debug",
        "gateway.http_port=1",
    ],
)
def test_a_process_may_have_its_own(setting: str) -> None:
    assert engine_job(load(TINY, [setting])).fields == engine_job(load(TINY)).fields


@pytest.mark.parametrize(
    "setting", ["engine.num_slots=4", "model.name=x", "platform.xla_flags=--x"]
)
def test_a_shared_field_differs(setting: str) -> None:
    shared = engine_job(load(TINY)).fields
    other = engine_job(load(TINY, [setting])).fields
    assert {name for name in shared if shared[name] != other[name]} == {setting.split("=")[0]}


def test_every_own_field_exists() -> None:
    assert set(jobs._OWN) <= flatten(load(TINY)).keys()
