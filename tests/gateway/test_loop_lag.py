"""The event loop's delay: measured, and bounded while texts are tokenized."""

import asyncio
import random
import time

from prometheus_client import generate_latest

from jserve.core.clock import WallClock
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.loop_lag import LoopLag
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.pauses import Pauses
from jserve.gateway.prometheus import make_registry
from jserve.gateway.tokenizer import TextTokenizer
from tests.gateway.fixtures import INFO
from tests.gateway.tiny_tokenizers import byte_level_json, sentencepiece_json

HEX = "".join(random.Random(0).choices("0123456789abcdef ", k=150_000))


async def beats(work) -> int:
    """How often another task ran while `work` did."""
    count = 0

    async def beat() -> None:
        nonlocal count
        while True:
            await asyncio.sleep(0.001)
            count += 1

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0)
    await work
    beating.cancel()
    return count


def test_the_loop_goes_on_while_texts_are_encoded_and_decoded():
    for source in (byte_level_json(), sentencepiece_json()):
        tokenizer = TextTokenizer(source)
        ids = tokenizer.encode(HEX)
        texts = [HEX[i : i + 2000] for i in range(0, len(HEX), 2000)]
        assert len(ids) > 50_000

        async def main(tokenizer=tokenizer, ids=ids, texts=texts):
            assert await beats(tokenizer.encode_all([HEX])) >= 5
            assert await beats(tokenizer.encode_all(texts)) >= 5
            assert await beats(tokenizer.decode_async(ids)) >= 1
            assert await tokenizer.encode_all(texts[:3]) == [*map(tokenizer.encode, texts[:3])]
            assert await tokenizer.decode_async(ids) == tokenizer.decode(ids)

        asyncio.run(main())


def test_work_in_parts_pauses():
    async def work() -> None:
        pauses = Pauses()
        for _ in range(50):
            time.sleep(0.001)
            await pauses.end()

    assert asyncio.run(beats(work())) >= 5


def test_the_lag_is_a_metric():
    metrics = GatewayMetrics(clock=WallClock())

    async def main():
        lag = LoopLag(metrics)
        lag.start()
        await asyncio.sleep(0.03)
        time.sleep(0.2)  # somebody holds the loop
        await asyncio.sleep(0.03)
        await lag.stop()

    asyncio.run(main())
    text = generate_latest(make_registry(metrics, FakeEngine(INFO), lambda: "m")).decode()
    assert "# TYPE jserve_event_loop_lag_seconds histogram" in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if "loop_lag" in line)
    assert float(values["jserve_event_loop_lag_seconds_sum"]) > 0.15
    below = float(values['jserve_event_loop_lag_seconds_bucket{le="0.15"}'])
    assert below < float(values["jserve_event_loop_lag_seconds_count"])
