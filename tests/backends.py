"""The backends that tests of ops and models run on."""

import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.native import library

_NATIVE = pytest.param(
    Backend.NATIVE,
    marks=pytest.mark.skipif(
        not library.is_loaded(), reason="no C++ compiler built the native kernels"
    ),
)
BACKENDS = [Backend.REFERENCE, Backend.CPU, _NATIVE]
INVARIANT_BACKENDS = [Backend.CPU, _NATIVE]  # a row's bits depend on nothing but the row
