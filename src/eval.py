"""Evaluate: `python src/eval.py run=FOLDER` or `runs=FOLDER`; see `--help` for the other keys."""

import sys

from symbiotic.studies.evaluation_command import main

if __name__ == "__main__":
    sys.exit(main())
