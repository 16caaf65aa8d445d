"""The `options` of the Ollama API → sampling fields."""

from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, as_integer
from jserve.gateway.validation import SamplingFields

_SAME = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "seed")
# Options about how Ollama loads a model; this one is loaded.
_OF_LOADING = (
    *("numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all"),
    *("vocab_only", "use_mmap", "use_mlock", "embedding_only", "num_thread", "num_keep"),
)
# Samplers that are not served, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "penalize_newline": (True,),
}
_OF_MIROSTAT = ("mirostat_tau", "mirostat_eta")
_PENALIZED = (-1, 64)  # values of repeat_last_n: the whole context, and Ollama's default
_KNOWN = (
    *(*_SAME, *_INTEGERS, *_OF_LOADING, *_OF_MIROSTAT),
    *("num_predict", "repeat_penalty", "repeat_last_n", "stop"),
)
_NO_LIMIT = 2**31 - 1  # the context bounds it


def read_options(options: Fields) -> tuple[SamplingFields, Any, int | None]:
    """Returns sampling fields, stop strings, and the most tokens of an answer (None: unset).

    `repeat_penalty` is over prompt and output, which is `repeat_last_n` of -1. The context bounds
    `num_predict`, as in Ollama.
    """
    values = {name: options.raw(name) for name in _SAME}
    values |= {name: as_integer(options.raw(name)) for name in _INTEGERS}
    values["repetition_penalty"] = options.raw("repeat_penalty")
    last = options.integer("repeat_last_n")
    if values["repetition_penalty"] not in (None, 1) and last not in (None, *_PENALIZED):
        name = options.name("repeat_last_n")
        message = f"{name} must be -1: repeat_penalty is over the whole context"
        raise RequestError(message, param=name)
    most = options.integer("num_predict")
    if most == 0:
        name = options.name("num_predict")
        raise RequestError(f"{name} must be at least 1, or -1 for no limit", param=name)
    if most is not None and most < 0:
        most = _NO_LIMIT
    stop = options.raw("stop")
    for name in (*_OF_LOADING, *_OF_MIROSTAT):
        options.raw(name)
    options.finish(_UNSUPPORTED, _KNOWN)
    return SamplingFields(**values), stop or None, most
