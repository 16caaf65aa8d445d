"""The command `convert`: a model between GGUF, Hugging Face and native form."""

from pathlib import Path

from jserve.checkpoints.config import Dtype, Quantization
from jserve.checkpoints.progress import FileProgress
from jserve.launch.console import Console
from jserve.model.loading import convert as formats


def convert(source: str, folder: str, to: str, dtype: str, quantization: str) -> int:
    """Writes `folder`, all or nothing; returns the exit code."""
    console = Console()
    progress = FileProgress("converted", console.say)
    formats.convert(
        Path(source),
        Path(folder),
        formats.Format(to),
        dtype=Dtype(dtype),
        quantization=Quantization(quantization),
        progress=progress,
    )
    console.say(f"{folder} is complete; serve it with a config whose model.source is {folder!r}")
    return 0
