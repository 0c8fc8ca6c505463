"""The notebook of the tutorial, run on fewer and smaller images: its model finds far more than chance."""

from __future__ import annotations

import json
import sys

import nbformat
import pytest
from house import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
from run_tutorial import LINES, NOTEBOOK, run, shorten

SMALL = {"IMAGES": "384", "TEST_IMAGES": "48", "SIZE": "48", "EPOCHS": "3", "THREADS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SMALL, "TUTORIAL": str(folder), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        return run(ROOT)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/jpeg" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


def test_the_model_of_the_tutorial_finds_images(notebook: nbformat.NotebookNode) -> None:
    """Mean recall is at least twice chance: 37 against 11 when this was written."""
    (line,) = [line for line in printed(notebook).splitlines() if line.startswith("mean_recall ")]
    _, reached, _, _, chance, _ = line.split()
    assert float(reached) > 2 * float(chance)
    assert pictures(notebook) == 4  # the drawn images, two searches, belief


def test_the_stored_notebook_is_small_and_whole(notebook: nbformat.NotebookNode) -> None:
    """It shows the outputs of its own code, and nothing of the machine that it ran on."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert pictures(stored) == pictures(notebook)
    assert "mean_recall" in printed(stored)
    assert NOTEBOOK.stat().st_size < 400_000
    assert str(ROOT) not in json.dumps(stored)
    shorten(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("text", "").count("\n") <= LINES + 1
