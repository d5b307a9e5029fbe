"""Convert a checkpoint from disk to disk: `python src/convert_hf.py folder=IN out=OUT to=…`; see `--help`."""

import sys

from symbiotic.studies.convert_hf import main

if __name__ == "__main__":
    sys.exit(main())
