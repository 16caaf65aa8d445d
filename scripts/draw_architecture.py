"""Draws docs/architecture.svg: the way of one request through gateway, engine and device.

python scripts/draw_architecture.py
"""

from html import escape
from pathlib import Path

OUTPUT = Path(__file__).parent.parent / "docs" / "architecture.svg"

WIDTH, HEIGHT = 960, 918
LEFT, RIGHT, BOX = 50, 570, 340  # x of the two columns of boxes, and the width of a box
MIDDLE, MIDDLE_WIDTH = 408, 144
BOX_HEIGHT = 56

STYLE = """
text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #1d2733; }
.title { font-size: 15px; font-weight: bold; }
.file { font-size: 12px; fill: #566573; }
.data { font-size: 13px; font-family: Menlo, 'DejaVu Sans Mono', monospace; fill: #8e3b13; }
.room { font-size: 13px; fill: #566573; font-weight: bold; }
.process { fill: #f4f6f8; stroke: #b8c2cc; }
.turn { fill: none; stroke: #7f8c99; stroke-dasharray: 6 4; }
.box { fill: #ffffff; stroke: #2c3e50; stroke-width: 1.3; }
.memory { fill: #fdf3e3; stroke: #b9770e; }
.device { fill: #e8f1fa; stroke: #21618c; stroke-width: 1.3; }
.arrow { stroke: #2c3e50; stroke-width: 1.6; fill: none; marker-end: url(#head); }
.use { stroke: #b9770e; stroke-width: 1.2; fill: none; marker-end: url(#head); }
"""


def text(x: float, y: float, value: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(value)}</text>'


def frame(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{kind}"/>'


def box(
    x: float, y: float, title: str, files: str, *, width: float = BOX, kind: str = "box"
) -> list[str]:
    """A box with a title and the files that do its work."""
    centre = x + width / 2
    return [
        frame(x, y, width, BOX_HEIGHT, kind),
        text(centre, y + 24, title, "title", "middle"),
        text(centre, y + 43, files, "file", "middle"),
    ]


def line(start: tuple[float, float], end: tuple[float, float], kind: str = "arrow") -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<path d="M {x1} {y1} L {x2} {y2}" class="{kind}"/>'


def down(y: float, end: float, data: str, at: float | None = None) -> list[str]:
    """An arrow of the left column and, at height `at`, the name of the data that takes it."""
    x = LEFT + 60
    return [line((x, y), (x, end)), text(x + 12, at or (y + end) / 2 + 5, data, "data")]


def up(y: float, end: float, data: str, at: float | None = None) -> list[str]:
    """An arrow of the right column and, at height `at`, the name of the data that takes it."""
    x = RIGHT + BOX - 60
    return [line((x, y), (x, end)), text(x - 12, at or (y + end) / 2 + 5, data, "data", "end")]


def memory(y: float, title: str, detail: str) -> list[str]:
    """Draws the books that plan and commit both change, between the two."""
    centre = y + BOX_HEIGHT / 2
    return [
        *box(MIDDLE, y, title, detail, width=MIDDLE_WIDTH, kind="memory"),
        line((LEFT + BOX, centre), (MIDDLE - 3, centre), "use"),
        line((RIGHT, centre), (MIDDLE + MIDDLE_WIDTH + 3, centre), "use"),
    ]


def gateway() -> list[str]:
    right = WIDTH - 26
    return [
        frame(26, 98, WIDTH - 52, 218, "process"),
        text(WIDTH / 2, 118, "gateway process", "room", "middle"),
        *down(60, 127, "bytes", 84),
        *up(130, 63, "event, or GenerateResponse", 84),
        *box(LEFT, 130, "1  parse, render, tokenize", "gateway/http, grpc_service, request_plane"),
        *down(186, 237, "GenerationRequest → Request"),
        *box(LEFT, 240, "2  send to the engine", "gateway/grpc_engine_client"),
        *box(RIGHT, 130, "write the answer", "gateway/http/event_stream, grpc_messages"),
        *up(240, 189, "OutputDelta"),
        *box(RIGHT, 240, "9  detokenize, find stop strings", "gateway/output, detokenizer"),
        text(right - 14, 118, "no JAX", "room", "end"),
    ]


def engine() -> list[str]:
    bottom = 720 + BOX_HEIGHT
    return [
        frame(26, 366, WIDTH - 52, 432, "process"),
        text(WIDTH / 2, 386, "engine process", "room", "middle"),
        *down(296, 397, "EngineRequest"),
        *up(400, 299, "SequenceUpdate"),
        *box(LEFT, 400, "3  drain the inbox", "engine/worker/session, inbox, loop"),
        *box(RIGHT, 400, "post updates", "engine/loop, worker/session"),
        frame(36, 486, WIDTH - 72, bottom - 476, "turn"),
        text(WIDTH / 2, 504, "Pipeline.turn", "room", "middle"),
        *down(456, 517, "Request", 475),
        *up(520, 459, "SequenceUpdate", 475),
        *box(LEFT, 520, "4  plan", "scheduler/planner, policy"),
        *memory(520, "Lifecycle", "Sequence, slots"),
        *box(RIGHT, 520, "8  commit", "scheduler/scheduler"),
        *down(576, 617, "StepPlan of Chunks"),
        *up(620, 579, "StepResult"),
        *box(LEFT, 620, "5  pack", "engine/program/batch, layout"),
        *box(MIDDLE, 620, "KVCache", "pages", width=MIDDLE_WIDTH, kind="memory"),
        line((480, 576), (480, 617), "use"),
        *box(RIGHT, 620, "7  collect", "engine/executor"),
        *down(676, 717, "Batch"),
        *up(720, 679, "DeviceResult"),
        *box(
            LEFT,
            720,
            "6  submit: page moves, then one program",
            "engine/executor, engine/program/step: layers, logits, sampling, stop test, "
            "new DeviceState",
            width=RIGHT + BOX - LEFT,
            kind="device",
        ),
    ]


def followers() -> list[str]:
    return [
        line((WIDTH / 2, 720 + BOX_HEIGHT), (WIDTH / 2, 837)),
        text(WIDTH / 2 + 12, 822, "StepPlan, by engine/group/leader", "data"),
        *box(
            LEFT,
            840,
            "followers, if the engine has several processes",
            "engine/group/follower: packs and runs the same step, never reads a token",
            width=RIGHT + BOX - LEFT,
            kind="device",
        ),
    ]


def main() -> None:
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#2c3e50"/></marker>'
    )
    client = [
        frame(LEFT, 20, RIGHT + BOX - LEFT, 40, "box"),
        text(WIDTH / 2, 45, "client", "title", "middle"),
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">',
        "<title>One request through jserve</title>",
        f"<defs>{head}</defs><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *gateway(),
        *engine(),
        *followers(),
        *client,
        "</svg>",
    ]
    OUTPUT.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
