"""Executes the notebooks of the documentation: `python .ci/notebooks.py`, also `tox -e notebooks`.

Names, such as `supermasks`, select notebooks. `--write` also stores the outputs in the files. They
must not contain errors, log lines or paths of the machine.
"""

import contextlib
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
SECONDS = 600
# Log lines of TensorFlow, which say nothing about the notebook.
OF_TENSORFLOW = re.compile(
    r"^(WARNING: All log messages before absl|[IWE]0000 |INFO:tensorflow:).*\n?", re.M
)
OF_A_MACHINE = re.compile(r"/(home|root|tmp|usr|Users|opt|work)/|[A-Z]:\\|ipykernel_")


def execute(file: Path) -> nbformat.NotebookNode:
    """Executes a notebook in a folder without other files, and returns it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, record_timing=False, kernel_name="python3")
    with contextlib.suppress(CellExecutionError):  # Which is an output as well.
        client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = OF_TENSORFLOW.sub("", output.text)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("text", "kept")]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def faults_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Returns what must not be in the outputs of a notebook."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {texts[0] or output.get('evalue')}")
                continue
            found += [
                f"{cell.id}: a path in {text!r}" for text in texts if OF_A_MACHINE.search(text)
            ]
    return found


def main() -> int:
    """Executes all notebooks, and prints faults of their outputs."""
    names = [argument for argument in sys.argv[1:] if argument != "--write"] or ["*"]
    count = 0
    for file in sorted(file for name in names for file in FOLDER.glob(f"{name}.ipynb")):
        notebook = execute(file)
        faults = faults_of(notebook)
        if "--write" in sys.argv and not faults:
            nbformat.write(notebook, file)
        print(f"{file.name}: {len(faults)} faults", *faults, sep="\n", flush=True)
        count += len(faults)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
