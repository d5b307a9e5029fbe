"""Export a run for transformers: `python src/export_hf.py run=FOLDER`; see `--help` for the other keys."""

import sys

from symbiotic.studies.export_hf import main

if __name__ == "__main__":
    sys.exit(main())
