"""Encode the images of shards once: `python src/encode_shards.py shards=… encoder=kl path=… out=…`; see `--help`."""

import sys

from symbiotic.studies.encode_shards import main

if __name__ == "__main__":
    sys.exit(main())
