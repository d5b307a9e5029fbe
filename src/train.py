"""Train: `python src/train.py experiment=symbiotic`; see `--help` for the groups, `conf/` for every key."""

from symbiotic.launch import main

if __name__ == "__main__":
    main()
