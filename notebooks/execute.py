"""Execute the notebooks: `python notebooks/execute.py [NOTEBOOK ...] [--out FOLDER]`.

Each runs in a kernel of its own, on one core. The executed copies are written to FOLDER (`build/notebooks`); the
notebooks themselves stay as they are, without outputs. The first error ends it with exit status 1, and so does a
warning in an output.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
LIMIT = 600  # seconds for one cell, also on a busy machine


def execute(path: Path, folder: Path) -> str | None:
    """Write the executed copy; returns what went wrong."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=LIMIT,
        extra_arguments=["--log-level=ERROR"],  # it warns that it talks in plain text, which stays on this machine
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)
    finally:
        nbformat.write(notebook, folder / path.name)
    printed = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    return printed[0]["text"] if printed else None


def cpu_seconds() -> float:
    """Of the kernels that have ended: on a busy machine, what a notebook costs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/execute.py", description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "notebooks")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen.out.mkdir(parents=True, exist_ok=True)
    for path in chosen.notebooks:
        start, used = time.perf_counter(), cpu_seconds()
        problem = execute(path, chosen.out)
        spent = f"{time.perf_counter() - start:.0f} s, {cpu_seconds() - used:.0f} s of a core"
        print(f"{path.name}: {spent}; {chosen.out / path.name}", flush=True)
        if problem is not None:
            print(f"error: {path}: {problem}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
