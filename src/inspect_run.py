"""Inspect: `python src/inspect_run.py run=FOLDER prompt="..."`; see `--help` for the other keys."""

import sys

from symbiotic.studies.inspection import main

if __name__ == "__main__":
    sys.exit(main())
