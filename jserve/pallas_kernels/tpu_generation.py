"""The generation of TPU that a program is made for, by which block sizes are looked up."""

import jax

# The interpreter, and generations that nobody has tuned for yet.
OTHER = "other"
_KINDS = {
    "TPU v5e": "v5e",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v6 lite": "v6e",
}


def generation_in_use() -> str:
    """The generation of the current mesh, or else of the devices JAX runs on.

    A mesh counts first: a program may be compiled for a TPU where there is none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return _KINDS.get(device.device_kind, OTHER)
    if jax.default_backend() == "tpu":
        return _KINDS.get(jax.devices()[0].device_kind, OTHER)
    return OTHER
