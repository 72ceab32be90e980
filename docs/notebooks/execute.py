"""Run the notebooks of this folder in Jupyter and keep what they show: `python docs/notebooks/execute.py [NAME...]`.

nbclient runs them, in a kernel of this environment and in this folder, because it is what Jupyter itself runs notebooks
with and nothing else: no converter, no server. What changes from run to run and says nothing (times, ids, versions) is
left out, so that a difference in a notebook is a difference in what it says. The tests run the same cells without
Jupyter and compare (tests/test_documents.py); the site takes notebooks as they are committed (docs/site_hooks.py).
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(path: Path) -> None:
    """Run one notebook and write it back with its outputs. Errors: those of its cells (CellExecutionError)."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            if output.output_type == "execute_result" and len(output.data) > 1:
                output.data.pop("text/plain", None)  # an address in memory, beside the table or figure
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["DIFFSPEC_CACHE_DIR"] = os.environ["PYTHONWARNINGS"] = ""
    for notebook_path in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        execute(notebook_path)
        print(f"{notebook_path.name}: {notebook_path.stat().st_size / 1000:.0f} kB")
