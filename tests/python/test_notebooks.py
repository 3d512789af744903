"""Every notebook runs from its first cell to its last, and says what it asks, answers and reads."""

import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_COMMITTED_BYTES = 1 << 20


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    pictures = [
        output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert pictures, "a notebook shows what it talks about"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_opens_with_question_answer_and_data(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    for word in ("Question", "Answer", "Data"):
        assert f"**{word}" in first.source, word
    assert path.stat().st_size < MOST_COMMITTED_BYTES
    assert any(cell.get("outputs") for cell in notebook.cells), "committed with its outputs"
    text = path.read_text(encoding="utf-8")
    for place in (FOLDER.parent, Path.home(), Path(tempfile.gettempdir())):
        assert f"{place}/" not in text
