"""Draw images: `python src/generate.py run=FOLDER prompt="..."`; see `--help` for the other keys."""

import sys

from symbiotic.studies.generate import main

if __name__ == "__main__":
    sys.exit(main())
