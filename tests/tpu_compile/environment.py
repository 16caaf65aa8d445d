"""Environment that libtpu needs where there is no TPU; import this before JAX starts."""

import os

# libtpu asks a cloud machine for these; any valid answer will do.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a TPU has one owner; several processes may compile
}
os.environ.pop("XLA_FLAGS", None)
