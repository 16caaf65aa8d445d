"""The fingerprint of answers: changed by what they depend on, and by nothing else."""

import re
from dataclasses import replace

import pytest

from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.fingerprint import fingerprint
from tests.gateway.fixtures import INFO

BASE = fingerprint(INFO, SamplingDefaults())


def test_it_looks_like_openais():
    assert re.fullmatch("fp_[0-9a-f]{16}", BASE)


@pytest.mark.parametrize("field", [{"num_slots": 1}, {"num_pages": 1}, {"max_queue": 1}])
def test_capacities_do_not_change_it(field):
    assert fingerprint(replace(INFO, **field), SamplingDefaults()) == BASE


def test_answers_depend_on_the_rest():
    others = {
        fingerprint(replace(INFO, model="other"), SamplingDefaults()),
        fingerprint(replace(INFO, max_model_len=99), SamplingDefaults()),
        fingerprint(INFO, SamplingDefaults(temperature=0.5)),
        fingerprint(replace(INFO, numerics="other"), SamplingDefaults()),
    }
    assert len(others - {BASE}) == 4
