"""The backends that tests of ops and models run on."""

import shutil

import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.native import library
from jserve.pallas_kernels.native.build import COMPILERS

# With a compiler the kernels must be there: a build that fails is a failure, not a skip.
_CAN_BUILD = any(map(shutil.which, COMPILERS))
NATIVE_MARKS = (
    pytest.mark.skipif(
        not library.is_loaded() and not _CAN_BUILD, reason="there is no C++ compiler"
    ),
)
_NATIVE = pytest.param(Backend.NATIVE, marks=NATIVE_MARKS)
BACKENDS = [Backend.REFERENCE, Backend.CPU, _NATIVE]
INVARIANT_BACKENDS = [Backend.CPU, _NATIVE]  # a row's bits depend on nothing but the row
# For tests that take long: the backend that a CPU is served with. `make sweep` runs the other.
SERVED_BACKENDS = [pytest.param(Backend.CPU, marks=pytest.mark.sweep), _NATIVE]
