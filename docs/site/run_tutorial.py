"""Runs the notebook of the tutorial and stores it with the end of each output, which the site and GitHub show.

python docs/site/run_tutorial.py            # about five minutes; writes docs/tutorial.ipynb
IMAGES=600 python docs/site/run_tutorial.py # smaller
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LINES = 12  # kept of the output of a command


class LocalKernel(AsyncKernelManager):
    """Is spoken to through files that only this user can open, not through ports."""

    transport = "ipc"


def run(folder: Path = ROOT) -> nbformat.NotebookNode:
    """Returns the notebook with its outputs. Raises CellExecutionError, which has the output of the failed cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    place = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, kernel_manager_class=LocalKernel, timeout=1200, resources=place).execute()


def shorten(notebook: nbformat.NotebookNode) -> None:
    """Joins the texts that a cell printed and keeps their end; forgets when each cell ran."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            lines = "".join(each.text for each in cell.outputs if each.output_type == "stream").splitlines()
            pictures = [each for each in cell.outputs if each.output_type == "display_data"]
            text = "\n".join((["..."] if len(lines) > LINES else []) + lines[-LINES:])
            printed = [nbformat.v4.new_output("stream", text=text + "\n")] if lines else []
            cell.outputs = [*printed, *pictures]


if __name__ == "__main__":
    done = run()
    shorten(done)
    nbformat.write(done, NOTEBOOK)
