"""The watch over an engine, by a clock that the test turns."""

import pytest

from jserve.gateway.engine_watch import EngineWatch, Verdict


class Watched:
    """A watch that is asked every 250 ms, and an engine that says so many steps each second."""

    def __init__(self) -> None:
        self.watch = EngineWatch(suspect_s=5, hang_s=30)
        self.now_s = 100.0
        self.steps = 0
        self.watch.heard(0)
        self.watch.tick(self.now_s, busy=False)

    def pass_s(
        self,
        seconds: float,
        *,
        busy: bool = True,
        steps_a_second: int = 0,
        silent: bool = False,
        compiling: bool = False,
    ) -> Verdict:
        verdict = self.watch.verdict
        for tick in range(round(seconds * 4)):
            self.now_s += 0.25
            if tick % 4 == 0 and not silent:
                self.steps += steps_a_second
                self.watch.heard(self.steps, compiling=compiling)
            verdict = self.watch.tick(self.now_s, busy=busy)
        return verdict


def test_an_engine_that_works_or_has_no_work_is_fine() -> None:
    watched = Watched()
    assert watched.pass_s(100, steps_a_second=1) is Verdict.FINE
    assert watched.watch.standing_s <= 1
    assert watched.pass_s(100, busy=False) is Verdict.FINE
    assert watched.pass_s(3.5) is Verdict.FINE  # with the second before it: less than 5


def test_a_number_that_stands_still() -> None:
    watched = Watched()
    assert watched.pass_s(4.5) is Verdict.FINE
    assert watched.pass_s(1) is Verdict.SUSPECT
    assert watched.watch.standing_s == pytest.approx(5.5)
    assert "ended no step for 5.5 s" in watched.watch.reason
    assert watched.pass_s(24) is Verdict.SUSPECT
    assert watched.pass_s(1) is Verdict.HUNG
    assert watched.pass_s(1, steps_a_second=1) is Verdict.FINE


def test_silence() -> None:
    watched = Watched()
    assert watched.pass_s(4.5, silent=True) is Verdict.FINE
    assert watched.pass_s(1, silent=True) is Verdict.SUSPECT
    assert "sent nothing for 5.5 s" in watched.watch.reason
    assert watched.pass_s(25, silent=True) is Verdict.HUNG


def test_clients_that_give_up_do_not_clear_an_engine() -> None:
    watched = Watched()
    watched.pass_s(3)
    assert watched.pass_s(60, busy=False) is Verdict.FINE  # nothing speaks against it yet
    assert watched.pass_s(2.5) is Verdict.SUSPECT
    # It gets no work any more, so it could never be found out.
    assert watched.pass_s(25, busy=False) is Verdict.HUNG


def test_compiling_takes_its_time() -> None:
    watched = Watched()
    assert watched.pass_s(120, compiling=True) is Verdict.FINE
    assert watched.pass_s(6) is Verdict.SUSPECT
    # Even then the engine must say that it lives.
    watched = Watched()
    watched.pass_s(2, compiling=True)
    assert watched.pass_s(31, silent=True) is Verdict.HUNG


def test_stalls_of_the_gateway_itself_accuse_nobody() -> None:
    watched = Watched()
    watched.pass_s(2)
    watched.now_s += 600  # suspended, or stopped
    assert watched.watch.tick(watched.now_s, busy=True) is Verdict.FINE


def test_a_new_connection_counts_anew() -> None:
    watched = Watched()
    assert watched.pass_s(31) is Verdict.HUNG
    watched.watch.reset()
    assert watched.watch.verdict is Verdict.FINE
    assert watched.pass_s(4) is Verdict.FINE
