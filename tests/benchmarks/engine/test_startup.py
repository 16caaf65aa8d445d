"""Phases of compiling, told apart by the thread they happen in."""

import threading

from benchmarks.engine import startup


def test_the_phases_of_a_program_are_those_of_its_thread():
    times = startup.CompileTimes()

    def make(name, compile_s):
        times.on_event("/jax/core/compile/jaxpr_trace_duration", 0.1, fun_name="part")
        times.on_event("/jax/core/compile/jaxpr_trace_duration", 0.5, fun_name="step")
        times.on_event("/jax/core/compile/backend_compile_duration", compile_s)
        times.on_event("/jax/something/else", 9.0)
        times.on_program(name)

    threads = [threading.Thread(target=make, args=args) for args in (("a", 1.0), ("b", 2.0))]
    for thread in threads:
        thread.start()
        thread.join()
    assert times.programs["a"] == {"trace_s": 0.5, "lower_s": 0.0, "compile_s": 1.0}
    assert times.programs["b"]["compile_s"] == 2.0


def test_a_cached_program_has_no_phases():
    def found(**program):
        return {
            "imports_s": 1.0,
            "devices_s": 0.1,
            "engine_s": 2.0,
            "phases": {"load_s": 1.5},
            "programs": [{"name": "mixed[16]", "all_s": 2.0, **program}],
            "total_s": 3.1,
            "first_request_s": 0.2,
            "second_request_s": 0.1,
        }

    starts = {"compiled": found(trace_s=0.5, lower_s=0.25, compile_s=1.25), "cached": found()}
    lines = [line.split() for line in startup.table(starts).splitlines()]
    assert lines[0] == ["seconds", "compiled", "cached"]
    assert ["mixed[16]", "2", "2"] in lines
    assert ["lower", "0.25", "–"] in lines
