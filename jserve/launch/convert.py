"""The command `convert`: a GGUF file or a Hugging Face folder to a native model folder."""

from pathlib import Path

from jserve.launch.console import Console, FileProgress
from jserve.model.formats.load import to_native


def convert(source: str, folder: str, dtype: str) -> int:
    """Writes `folder`, all or nothing; returns the exit code."""
    console = Console()
    to_native(Path(source), Path(folder), dtype, FileProgress("converted", console.say))
    console.say(f"{folder} is complete; serve it with --set model.source={folder}")
    return 0
