"""Temporary folders: gone at the end, and after a kill at the next start, whatever the pid."""

import subprocess
import sys
from pathlib import Path

import pytest

from jserve.checkpoints.config import ModelConfig, RandomWeights
from jserve.checkpoints.locate import remove_abandoned_files
from jserve.checkpoints.temporary import remove_abandoned, temporary_folder
from jserve.core.model_spec import ModelSpec

_MAKER = """
import sys, time
from pathlib import Path
from jserve.checkpoints.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]), "model") as folder:
    (folder / "part").write_text("half")
    print(folder, flush=True)
    time.sleep(60)
"""


def _start_maker(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", _MAKER, str(parent)]
    maker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    return maker, Path(maker.stdout.readline().strip())


def _end(maker: subprocess.Popen[str]) -> None:
    maker.kill()
    maker.communicate()


def test_nothing_is_left_at_the_end_or_after_an_error(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, "model") as folder:
        (folder / "part").write_text("whole")
        folder.rename(tmp_path / "model")
    with pytest.raises(FileNotFoundError), temporary_folder(tmp_path, "model"):
        raise FileNotFoundError  # an error of the body, not of the lock
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_folder_of_a_live_process_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    killed, left = _start_maker(tmp_path)
    _end(killed)
    assert (left / "part").exists()
    live, kept = _start_maker(tmp_path)
    try:
        assert not left.exists()
        with temporary_folder(tmp_path, "model"):
            assert (kept / "part").exists()
    finally:
        _end(live)
    remove_abandoned(tmp_path, "model")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_names_and_those_of_versions_without_locks(tmp_path: Path) -> None:
    other, old, no_folder = (tmp_path / name for name in (".other.1.tmp", ".model.1.tmp", ".model"))
    for folder in (other, old, no_folder):
        folder.mkdir()
    remove_abandoned(tmp_path, "model")
    assert sorted(tmp_path.iterdir()) == [no_folder, other]
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [no_folder]
    remove_abandoned(tmp_path / "nothing")


def test_the_next_start_cleans_the_cache_of_every_model(tmp_path: Path) -> None:
    spec = ModelSpec(
        family="llama", vocab=8, layers=1, model_dim=8, ffn_dim=8, q_heads=1, kv_heads=1,
        head_dim=8, max_position=8, norm_eps=1e-5, rope_theta=1e4, tied_embeddings=True,
    )  # fmt: skip
    for name in ("models/.a.7.tmp", "models/.b.1.tmp", "files/0123/.fetch.5.tmp", "models/a"):
        (tmp_path / name).mkdir(parents=True)
    source = RandomWeights(spec=spec)
    remove_abandoned_files(ModelConfig(name="x", source=source, cache_dir=str(tmp_path)))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"models", "models/a", "files", "files/0123"}
