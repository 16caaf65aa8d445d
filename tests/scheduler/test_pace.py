"""The pace of decode steps, and runs that it keeps short."""

import pytest

from jserve.scheduler.pace import Pace


def test_counts_the_time_that_the_device_worked() -> None:
    pace = Pace()
    assert pace.steps_within(1.0) is None  # nothing is known: no bound
    pace.committed(planned_s=10.0, now_s=10.4, num_steps=4)  # 100 ms a step, from an idle device
    assert pace.steps_within(1.01) == 5
    # Planned behind the step before, so begun when that ended: 200 ms a step, half way is 150.
    pace.committed(planned_s=10.0, now_s=11.2, num_steps=4)
    assert pace.steps_within(0.91) == 3
    pace.committed(planned_s=11.0, now_s=15.2, num_steps=0)  # a prompt says nothing of decodes
    assert pace.steps_within(0.91) == 3
    pace.committed(planned_s=11.1, now_s=15.5, num_steps=2)  # nor is its time the next run's
    assert pace.steps_within(0.91) == 3


@pytest.mark.parametrize(("wait_s", "steps"), [(0.0, None), (1e-9, 1), (0.25, 12)])
def test_bounds(wait_s: float, steps: int | None) -> None:
    pace = Pace()
    pace.committed(0.0, 0.08, 8)
    assert pace.steps_within(wait_s) == steps
