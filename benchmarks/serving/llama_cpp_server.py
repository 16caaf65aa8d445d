"""The HTTP server of llama.cpp from the wheel `xllamacpp`, where no `llama-server` is built.

python -m benchmarks.serving.llama_cpp_server --model model.gguf --port 8080
"""

import argparse
import importlib
import os
import signal


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--slots", type=int, default=16, help="requests at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one request")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    xllamacpp = importlib.import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.n_parallel = arguments.slots
    parameters.n_ctx = arguments.slots * arguments.context  # tokens of all slots together
    parameters.cpuparams.n_threads = arguments.threads
    parameters.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(parameters)
    print(f"serving on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # its threads do not all end by themselves


if __name__ == "__main__":
    main()
