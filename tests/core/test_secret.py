"""A secret is not shown by anything that prints values."""

import copy
import dataclasses
import json
import logging
import pickle

import pytest

from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types
from jserve.core.logs import LogFormat, StructuredFormatter
from jserve.core.secret import Secret

SECRET = Secret("topsecret")


@dataclasses.dataclass(frozen=True)
class Holder:
    keys: tuple[str | Secret, ...] = (SECRET,)
    one: Secret = SECRET


def test_nothing_that_prints_shows_it() -> None:
    shown = [repr(SECRET), str(SECRET), f"{SECRET}", "%s" % SECRET, repr(Holder())]  # noqa: UP031
    shown += [json.dumps({"a": (SECRET,)}, default=str), repr(dataclasses.asdict(Holder()))]
    assert not any("topsecret" in text for text in shown)
    assert all("<secret>" in text for text in shown)


@pytest.mark.parametrize("kind", LogFormat)
def test_no_log_line_shows_it(kind: LogFormat) -> None:
    record = logging.makeLogRecord({"msg": "key %s of %r", "args": (SECRET, Holder())})
    vars(record).update({"gateway.api_keys": (SECRET,), "one": SECRET})
    line = StructuredFormatter(kind).format(record)
    assert "topsecret" not in line
    assert line.count("<secret>") == 5


def test_a_wrong_type_in_its_place_is_not_shown() -> None:
    for wrong in (Holder(keys="topsecret"), Holder(one="topsecret"), Holder(keys=(b"topsecret",))):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="is <secret>, but must be of type") as caught:
            check_types(wrong)
        assert "topsecret" not in str(caught.value)


def test_it_is_a_value() -> None:
    assert SECRET == "topsecret"
    assert (Secret("a"), SECRET) == ("a", "topsecret")
    assert Secret("other") != SECRET
    assert {SECRET: 1}[Secret("topsecret")] == 1
    assert pickle.loads(pickle.dumps(SECRET)) == copy.deepcopy(SECRET) == SECRET
    assert SECRET.reveal() == "topsecret"
