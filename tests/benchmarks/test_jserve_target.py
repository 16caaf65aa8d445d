"""The client against jserve's own front ends, with a scripted engine behind them."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from benchmarks.serving import driver
from benchmarks.serving.failures import BenchmarkError, NotReady
from benchmarks.serving.grpc_target import GrpcTarget
from benchmarks.serving.http_target import HttpOptions, HttpTarget
from benchmarks.serving.metrics import Slo, summarize
from benchmarks.serving.workload import Job
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.http.app import make_app
from jserve.gateway.http.server import HttpServer
from jserve.gateway.metrics import GatewayMetrics
from tests.gateway.fixtures import INFO, closing, make_plane

JOBS = [Job(0, 7, 12, (i,)) for i in range(6)]
IDS = (270, 330)


@asynccontextmanager
async def jserve():
    """Both front ends: yields the ports of HTTP and gRPC."""
    engine = FakeEngine(replace(INFO, model="tiny"), tokens_per_step=4)
    plane = make_plane(engine)
    metrics = GatewayMetrics(clock=plane.clock)
    http = HttpServer(make_app(plane, metrics, version="0"), host="127.0.0.1", port=0, drain_s=1)
    grpc = GrpcServer(plane, metrics)
    await http.start()
    await grpc.start()
    async with closing(engine):
        try:
            yield http.port, grpc.port
        finally:
            await grpc.stop(0)
            await http.stop()


def run(make_target):
    async def main():
        async with jserve() as (http_port, grpc_port):
            target = make_target(http_port, grpc_port)
            try:
                info = await target.check()
                load = await driver.open_loop(
                    target, JOBS, timeout_s=10, on_done=lambda record: None
                )
            finally:
                await target.close()
            return info, summarize(load, Slo(ttft_ms=10_000))

    return asyncio.run(main())


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_http(api):
    options = HttpOptions(api=api, token_ids=IDS)
    info, summary = run(lambda http, grpc: HttpTarget(f"http://127.0.0.1:{http}/v1", options))
    assert (info.model, info.dialect, info.max_model_len) == ("tiny", "jserve", 512)
    assert summary["error_kinds"] == {}
    assert summary["output_tokens"] == 6 * 12
    assert summary["tokens_counted_by"] == "usage"
    assert summary["cached_tokens"] == 0
    assert summary["goodput"]["share"] == 1
    if api == "completions":
        assert summary["prompt_tokens"] == 6 * 7


def test_grpc():
    info, summary = run(lambda http, grpc: GrpcTarget(f"127.0.0.1:{grpc}", token_ids=IDS))
    assert (info.model, info.dialect, info.max_model_len) == ("tiny", "grpc", 512)
    assert summary["error_kinds"] == {}
    assert summary["output_tokens"] == 6 * 12
    assert summary["prompt_tokens"] == 6 * 7
    assert summary["tokens_of_chunks"] == "known"
    assert summary["cached_tokens"] == 0


def test_grpc_says_what_to_mend():
    with pytest.raises(BenchmarkError, match="does not serve 'other'; set --model to one of tiny"):
        run(lambda http, grpc: GrpcTarget(f"127.0.0.1:{grpc}", model="other"))
    with pytest.raises(NotReady, match=r"grpc://127\.0\.0\.1:1: UNAVAILABLE.*mend --url"):
        run(lambda http, grpc: GrpcTarget("127.0.0.1:1"))


def test_a_refused_request_is_an_error_of_the_load():
    _, summary = run(lambda http, grpc: GrpcTarget(f"127.0.0.1:{grpc}", token_ids=(5000, 5000)))
    assert summary["errors"] == 6
    (message,) = summary["error_kinds"]
    assert message.startswith("INVALID_ARGUMENT: prompt holds 5000")
