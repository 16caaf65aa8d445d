"""Engine jobs made from the whole config."""

from jserve.config import ServeConfig, flatten
from jserve.engine.job import EngineJob

# Sections whose values all processes of one engine must share, and fields that may differ.
_SHARED = ("model.", "engine.", "platform.")
_OWN = (
    "model.cache_dir",
    "engine.join_timeout_s",
    "engine.drain_timeout_s",
    "engine.step_log",  # the leader's alone: a follower writes none
)


def engine_job(
    config: ServeConfig,
    address: str = "",
    *,
    token: str | None = None,
    process: int = 0,
    leader_address: str | None = None,
) -> EngineJob:
    """The job of one engine process; see `EngineJob` for the arguments."""
    return EngineJob(
        model=config.model,
        engine=config.engine,
        scheduler=config.scheduler,
        cache=config.cache,
        platform=config.platform,
        log=config.log,
        fields={
            name: repr(value)
            for name, value in flatten(config).items()
            if name.startswith(_SHARED) and name not in _OWN
        },
        drain_s=config.drain_s,
        address=address,
        token=token,
        process=process,
        leader_address=leader_address,
    )
