"""The status lines between an engine process and its supervisor."""

import pytest

from jserve.proto.engine_status import (
    EngineStatus,
    Failed,
    ModelPrepared,
    PhaseProgress,
    PhaseStarted,
    Ready,
    decode,
    encode,
)


@pytest.mark.parametrize(
    "status",
    [
        PhaseStarted("compile", "mixed[256]"),
        PhaseProgress("naïve\n40 of 98 MB"),
        ModelPrepared(),
        Ready("127.0.0.1:8600", {"model": "smol"}, {"load": 1.25}),
        Failed("no file", is_config_error=True),
    ],
)
def test_a_status_survives_the_wire_as_one_line(status: EngineStatus) -> None:
    line = encode(status)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == status


@pytest.mark.parametrize(
    "line", [b"", b"\xff\n", b"[]\n", b"{}\n", b'{"kind":"Unknown"}\n', b'{"kind":"Ready","x":1}\n']
)
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not an engine status"):
        decode(line)
