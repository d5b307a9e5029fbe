"""Check shards: `python src/check_data.py shards=FOLDER`; see `--help` for the other keys."""

import sys

from symbiotic.studies.check_data import main

if __name__ == "__main__":
    sys.exit(main())
