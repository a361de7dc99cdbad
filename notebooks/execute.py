"""Runs each notebook in its own kernel, and stops at the first error or warning.

    python -m notebooks.execute              runs the saved notebooks and writes nothing
    python -m notebooks.execute --write      makes each .ipynb anew from its .py
    python -m notebooks.execute --only 01    only those whose names begin with 01

It needs the extra `notebooks`.
"""

import argparse
import base64
import copy
import os
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
SECONDS = 600  # for one cell; a notebook takes well under a minute on two idle cores

# The first figure of this notebook is on the first page of the site.
PICTURE = ("01_sophia_from_scratch", FOLDER.parent / "docs/images/landscape.png")

# Warnings are errors, except those of the programs that run the cells.
SETUP = """
import warnings

warnings.simplefilter("error")
for package in ("IPython", "ipykernel", "jupyter_client", "tornado", "traitlets", "zmq"):
    warnings.filterwarnings("ignore", module=rf"{package}\\b")
"""


def run(notebook: nbformat.NotebookNode) -> None:
    """Executes the cells in place; raises what a cell raises."""
    # The kernel draws into the notebook unless the environment names another backend.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env.setdefault("JAX_PLATFORMS", "cpu")
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    try:
        nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # its ports are local
            resources={"metadata": {"path": str(FOLDER)}},
        ).execute(env=env)
    finally:
        del notebook.cells[0]
    spoken = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    if spoken:
        raise RuntimeError("A cell wrote to stderr. Remove its cause:\n" + "".join(spoken))


def fresh(source: Path) -> nbformat.NotebookNode:
    """The notebook of a .py, with stable cell ids."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Saves it without what differs between machines, with cells numbered from one."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.jupytext.pop("text_representation", None)  # of the .py alone
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.write(notebook, path)
    if path.stem == PICTURE[0]:
        outputs = (output for cell in cells for output in cell.outputs)
        figures = (output.data["image/png"] for output in outputs if "data" in output)
        PICTURE[1].write_bytes(base64.b64decode(next(figures)))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make each .ipynb anew from its .py")
    parser.add_argument("--only", default="", help="how the notebooks' names begin")
    arguments = parser.parse_args()
    sources = sorted(FOLDER.glob(f"{arguments.only}*.py"))
    sources = [path for path in sources if path.stem[:2].isdigit()]
    if not sources:
        print(f"No notebook's name begins with {arguments.only!r}.", file=sys.stderr)
        return 2
    for source in sources:
        path = source.with_suffix(".ipynb")
        saved = fresh(source) if arguments.write else nbformat.read(path, as_version=4)
        notebook = copy.deepcopy(saved)
        start = time.perf_counter()
        try:
            run(notebook)
        except (nbclient.exceptions.CellExecutionError, RuntimeError) as error:
            print(f"{path.name} failed:\n{error}", file=sys.stderr)
            return 1
        if arguments.write:
            write(notebook, path)
        print(f"{time.perf_counter() - start:6.1f} s  {path.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
