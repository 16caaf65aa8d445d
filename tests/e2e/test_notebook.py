"""The Colab notebook runs from its first cell to its last, with the small model."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.server import REPOSITORY, user_environment

NOTEBOOK = REPOSITORY / "examples" / "jserve_colab.ipynb"
PARAMETERS = """
CONFIG = "configs/tiny_random.py"
BACKEND = "cpu"
CONCURRENCY = (1, 4)
MAX_TOKENS = 8
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = user_environment()
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("XLA_FLAGS", environment["XLA_FLAGS"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    parameters.source = PARAMETERS
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "exit code 0" in text
    assert "tokens/s" in text
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1
