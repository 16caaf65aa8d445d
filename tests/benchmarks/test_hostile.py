"""Rows of the table of attacks: medians of rounds, and which bars are missed."""

from benchmarks.serving.hostile import Round, row_of
from benchmarks.serving.hostile_victims import Seen, longest_lag_ms


def seen(health_ms: float, gap_ms: float, errors: tuple[str, ...] = ()) -> Seen:
    return Seen(health_ms=[1.0, health_ms], gaps_ms=[gap_ms] * 10, errors=list(errors))


def rounds(*attacked: Seen) -> list[Round]:
    attacker = {"sent": 3, "answers": {"400": 3}, "cpu_s": 0.1}
    return [Round(seen(10.0, 100.0), each, attacker) for each in attacked]


def test_one_bad_round_of_three_misses_no_bar():
    row = row_of("x", rounds(seen(60.0, 120.0), seen(500.0, 900.0), seen(12.0, 149.0)))
    assert row["health_ms"] == (10.0, 60.0)
    assert row["gap_p99_ratio"] == 1.49
    assert row["missed"] == []


def test_each_bar_is_missed_by_its_own_number():
    assert row_of("x", rounds(seen(60.1, 100.0)))["missed"] == ["/health"]
    assert row_of("x", rounds(seen(10.0, 201.0)))["missed"] == ["longest gap", "gap p99"]
    failed = row_of("x", rounds(seen(10.0, 100.0, ("/health: 503",))))
    assert failed["missed"] == ["errors: ['/health: 503']"]


def test_the_longest_lag_is_that_of_the_last_bucket_with_a_new_value():
    line = 'jserve_event_loop_lag_seconds_bucket{{le="{}"}} {}\n'

    def page(*counts: int) -> str:
        return "".join(map(line.format, ("0.01", "0.05", "0.1", "+Inf"), counts))

    assert longest_lag_ms(page(5, 6, 7, 7), page(9, 12, 13, 13)) == 50.0
    assert longest_lag_ms(page(5, 6, 7, 7), page(5, 6, 7, 7)) == 0.0
    assert longest_lag_ms("", page(1, 1, 2, 2)) == 100.0
