"""Merge LoRA: `python src/merge_lora.py run=FOLDER`; see `--help` for the other keys."""

import sys

from symbiotic.studies.merge_lora import main

if __name__ == "__main__":
    sys.exit(main())
