"""The real llama.cpp, by way of the HTTP server that xllamacpp has inside: text ↔ token ids."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class Vocabulary:
    """A GGUF file opened by llama.cpp; the server runs as long as the object lives."""

    def __init__(self, gguf: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = 512
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = 1
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
        """`parse_special`: a control token's text is that token, not characters."""
        fields = {"content": text, "parse_special": parse_special, "add_special": add_special}
        return self._post("/tokenize", fields)["tokens"]

    def detokenize(self, token_ids: list[int]) -> str:
        return self._post("/detokenize", {"tokens": token_ids})["content"]

    def _post(self, path: str, fields: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)
