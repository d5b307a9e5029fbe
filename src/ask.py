"""Ask: `python src/ask.py run=FOLDER question="..."`; see `--help` for the other keys."""

import sys

from symbiotic.studies.ask import main

if __name__ == "__main__":
    sys.exit(main())
