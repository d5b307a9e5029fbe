"""From a checkpoint of transformers, over shards of img2dataset and a folder of texts, to a report: the public commands
alone, each in a process of its own."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from people import TOKENIZER, img2dataset, texts
from symbiotic.callbacks.csv_log import read_rows

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")


def write_olmoe(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512}
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**sizes, initializer_range=0.2, pad_token_id=None, eos_token_id=None)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")


def write_mmlu(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("dev", 5), ("test", 6)):
        with (folder / f"abstract_algebra_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([f"what is {n}", "red", "blue", "a", "the", "ABCD"[n % 4]] for n in range(count))


def test_a_run_from_olmoe_on_shards_of_img2dataset_ends_in_a_report(tmp_path: Path, project_root: Path) -> None:
    write_olmoe(tmp_path / "olmoe")
    write_mmlu(tmp_path / "mmlu")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    img2dataset(tmp_path / "pairs", 4, 25)
    texts(tmp_path / "texts.jsonl", 60)
    places = {f"SYMBIOTIC_{name.upper()}": str(tmp_path / name) for name in ("runs", "data", "cache")}

    def command(*words: str) -> str:
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=project_root, env=os.environ | places, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    fit = "fit: crop, side: 8"
    sources = (
        f"t2i: {{format: img2dataset, files: '{tmp_path}/pairs', {fit}}}",
        f"mmu: {{format: img2dataset, files: '{tmp_path}/pairs', task: mmu, question: what is this, {fit}}}",
        f"lm: {{format: text, files: '{tmp_path}/texts.jsonl'}}",
    )
    checked = command("src/check_data.py", f"shards={tmp_path}/pairs", "format=img2dataset", "fit=crop", "side=8",
                      f"tokenizer={tmp_path}/tokenizer.json")  # fmt: skip
    assert "100" in checked
    train = [
        *("src/train.py", "experiment=smoke", f"init_from={tmp_path}/olmoe", "system=symbiotic_bridge", "log_every=1"),
        *("data=sources", f"data.source.sources={{{', '.join(sources)}}}", "~mix.weights.t2i_long"),
        *(f"data.source.tokenizer={tmp_path}/tokenizer.json", "data.row_tokens=64", "logger.tensorboard=null"),
        *("phases.steps=40", "phases.shield_steps=10", "rates.warmup=4"),
    ]
    command(*train)
    (run,) = (tmp_path / "runs" / "smoke").glob("symbiotic_bridge-*")
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["parameters"]["added"] == 0
    sizes = {name: value.numel() for name, value in load_file(run / "init.safetensors").items()}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "olmoe", local_files_only=True).num_parameters()
    latent = sum(size for name, size in sizes.items() if name.startswith(("latent_", "time_in.")))
    patches = sum(size for name, size in sizes.items() if name.startswith("vit_"))
    assert receipt["parameters"]["latent_modules"] == latent
    assert sum(sizes.values()) == read + latent + patches, "nothing else is new"
    assert receipt["masks_off"]["max_logit_change"] <= 1e-5
    assert receipt["pretrained"]["architecture"] == "OlmoeForCausalLM"
    rows = [row for row in read_rows(run / "metrics.csv") if row.get("train/flow")]
    assert len(rows) == 40
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    first, last = ([float(row["train/flow"]) for row in part] for part in (rows[:5], rows[-5:]))
    assert sum(last) < 0.7 * sum(first)
    account = json.loads((run / "data_account.json").read_text())
    assert {name: found["good"] for name, found in account["sets"].items()} == {"t2i": 100, "mmu": 100, "lm": 60}
    assert "is finished" in command(*train)  # the same command again finds it

    command("src/eval.py", f"runs={run.parent}", "study=none", "evaluation=official", "only=[mmlu]",
            f"evaluation.benchmarks.mmlu.folder={tmp_path}/mmlu", f"report={tmp_path}/report")  # fmt: skip
    report = (tmp_path / "report" / "report.md").read_text()
    assert "symbiotic_bridge" in report
    assert str(receipt["parent"]) in report
    assert "mmlu_share" in report

    command("src/export_hf.py", f"run={run}", f"out={tmp_path}/back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert model.num_parameters() == read
