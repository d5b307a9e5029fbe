"""Peak memory of converting a large random checkpoint from disk to disk, against 1.3 x its largest shard + 500 MB.

    python benchmarks/conversion.py [size=MB] [shard=MB] [folder=FOLDER]

Writes an OLMoE of random numbers in shards (default: 2048 MB in shards of 512 MB, below a temporary folder), converts
it with `src/convert_hf.py` to a parent and back, in processes of their own, whose peak resident memory the system tells
(`wait4`). What is on the disk afterwards is removed. Needs three times the size on the disk.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from symbiotic.convert.families import FAMILIES, model_of_file
from symbiotic.convert.huggingface import places
from symbiotic.convert.tensor_files import write_shards
from symbiotic.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 1024, "intermediate_size": 1024}
CONFIG |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32768, "rms_norm_eps": 1e-5}
CONFIG |= {"num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": False, "tie_word_embeddings": False}
CONFIG |= {"rope_theta": 10000.0, "initializer_range": 0.02, "dtype": "bfloat16"}


def write_random(folder: Path, size: int, shard: int) -> list[Path]:
    """size, shard: in bytes, about. The random numbers are one block, over and over."""
    width, experts = CONFIG["hidden_size"], CONFIG["num_experts"]
    layer = 2 * (4 * width**2 + 3 * experts * width * CONFIG["intermediate_size"])
    layers = max(1, round((size - 4 * CONFIG["vocab_size"] * width) / layer))
    write_json(folder / "config.json", CONFIG | {"num_hidden_layers": layers})
    listed = list(places(FAMILIES["OlmoeForCausalLM"], model_of_file(folder)))
    block = (0.02 * torch.randn(2**25)).bfloat16()

    def random() -> Iterator[tuple[str, Tensor]]:
        for place in listed:
            yield place.theirs, block[: math.prod(place.shape)].view(place.shape)

    return write_shards(folder, {place.theirs: ("BF16", place.shape) for place in listed}, random(), shard)


def peak_of(command: list[str]) -> tuple[int, float]:
    """Peak resident memory of a process in bytes, and its seconds on the clock. Raises SystemExit where it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - begun


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    size, shard = (int(given.get(key, default)) * 2**20 for key, default in (("size", "2048"), ("shard", "512")))
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as base:
        files = write_random(Path(base) / "in", size, shard)
        sizes = [file.stat().st_size for file in files]
        bound, ok = 1.3 * max(sizes) + 500e6, True
        print(f"{len(files)} shards, {sum(sizes) / 1e6:,.0f} MB, the largest {max(sizes) / 1e6:,.0f} MB")
        idle, _ = peak_of([sys.executable, "-c", "import symbiotic.convert.disk"])
        print(f"interpreter and imports alone   {idle / 1e6:7,.0f} MB")
        for source, to in (("in", "parent"), ("parent", "hf")):
            script = [
                sys.executable,
                str(ROOT / "src" / "convert_hf.py"),
                f"folder={base}/{source}",
                f"out={base}/{to}",
            ]
            peak, seconds = peak_of([*script, f"to={to}", *([f"shard={shard // 2**20}"] if to == "hf" else [])])
            ok = ok and peak <= bound
            facts = json.loads((Path(base) / to / "conversion.json").read_text())
            largest = f"largest tensor {facts['largest_tensor'] / 1e6:,.0f} MB, {seconds:.0f} s"
            print(f"to={to:<8} peak resident memory {peak / 1e6:7,.0f} MB of at most {bound / 1e6:,.0f} MB ({largest})")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
