"""The peer transformers, as far as a test goes without the package."""

import sys

import pytest

from benchmarks.engine import transformers_generate
from benchmarks.serving.failures import BenchmarkError


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["transformers_generate", *flags])
    return transformers_generate.main()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BenchmarkError, match=r"torch is not in .*pip install torch transformers"):
        run(monkeypatch, "--model", "folder")


def test_a_folder_without_a_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_generate, "_library", lambda name: object())
    with pytest.raises(BenchmarkError, match="no Hugging Face folder"):
        run(monkeypatch, "--model", str(tmp_path))


def test_the_table_leaves_out_what_was_not_measured():
    row = {
        "batch": 8,
        "prefill_tokens_per_s": [900.0, 1000.0, 800.0],
        "output_tokens_per_s": [9.0],
        "decode_tokens_per_s": [],
    }
    assert transformers_generate._table([row]).splitlines()[1].split() == ["8", "900", "9", "–"]
