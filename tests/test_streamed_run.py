"""A run whose data are streams: the whole arc, and the bits of an undisturbed run after kills and on other ranks."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from campaigns import disturb, in_turns
from people import TOKENIZER, img2dataset, jsonl, llava
from served import serving
from subjects import Subject, apart, lines
from symbiotic import arc
from symbiotic.callbacks.checkpoint import newest_valid
from symbiotic.config import compose
from symbiotic.data.sources import parse_origins
from symbiotic.files import read_json
from symbiotic.runs import load_state
from symbiotic.schema import Config, ConfigError
from towers import TOWER, clip_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layouts, one bad line among them."""
    folder = tmp_path_factory.mktemp("streams")
    TOKENIZER.save(folder / "tokenizer.json")
    img2dataset(folder / "pairs", 4, 25)
    llava(folder / "talks", 40)
    lines = [{"text": f"this is number {n}"} for n in range(120)]
    jsonl(folder / "texts.jsonl", [*lines[:50], {"body": "red"}, *lines[50:]])
    return folder


def overrides(files: Path, pairs: str, texts: str) -> list[str]:
    fit = "fit: crop, side: 8"
    sources = (
        f"t2i: {{format: img2dataset, files: '{pairs}', {fit}}}",
        f"lm: {{format: text, files: '{texts}'}}",
        f"mmu: {{format: llava, files: '{files}/talks/llava.json', images: '{files}/talks/images', {fit}}}",
    )
    return [
        *(f"data.source.sources={{{', '.join(sources)}}}", f"data.source.tokenizer={files / 'tokenizer.json'}"),
        *("~mix.weights.t2i_long", "~init.stage0.mix.weights.lm_unreplayed", "data.row_tokens=64"),
    ]


@pytest.fixture(scope="module")
def given(files: Path) -> list[str]:
    """Overrides of a run on streams of files."""
    return ["data=stream", *overrides(files, f"{files}/pairs", f"{files}/texts.jsonl"), *SMALL]


SMALL = ("data.source.window=9", "data.source.head=24")
FEW = ("phases.steps=6", "phases.shield_steps=2", "save_every=3", "log_every=2", "logger.tensorboard=null",
       "init.stage0.max_steps=4")  # fmt: skip


def run(folder: Path, *given: str) -> Config:
    paths = [f"paths.{name}={folder / name}" for name in ("runs", "data", "cache")]
    config = compose(["experiment=smoke", *given, "data.samples=16", "data.micro_batches=2", *FEW, *paths])
    arc.run(config)
    return config


@pytest.fixture(scope="module")
def streamed(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(run(tmp_path_factory.mktemp("run"), *given).run_dir)


def test_a_run_on_streams(streamed: Path) -> None:
    assert read_json(streamed / "summary.json")["image_size"] == [8, 8]
    newest = newest_valid(streamed / "checkpoints")
    assert newest is not None
    streams = torch.load(newest, weights_only=True)["streams"]
    assert streams["step"] == 6
    moved = {name: bool(state["offset"] or state["file"] or state["epoch"]) for name, state in streams["state"].items()}
    assert moved == {"t2i": True, "lm": True, "mmu": True}
    account = read_json(streamed / "data_account.json")
    assert account["sets"]["lm"]["good"] > 30
    assert account["sets"]["t2i"]["bad"] == 0


CANARIES = ("canary-password-1", "canary-signature-2", "canary-token-3", "canary-key-4", "canary-login-5")


def test_a_run_on_streams_with_a_tower_inside_the_model(given: list[str], tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip", TOWER)
    run_dir = Path(run(tmp_path, *given, "vision=tower", f"model.vision.path={tmp_path / 'clip'}").run_dir)
    before, after = (load_state(run_dir / name) for name in ("init.safetensors", "model.safetensors"))
    moved = [name for name in before if name.startswith("vision.") and not torch.equal(before[name], after[name])]
    assert moved  # it has read images
    assert read_json(run_dir / "data_account.json")["sets"]["mmu"]["good"] > 0


def test_from_a_server_that_fails_a_run_has_the_same_bits(
    files: Path, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions and texts over HTTP, every fifth connection dropped and every seventh answer 503; two workers. S4: of
    the password, the signatures and what the environment holds, nothing is in a file of the run, its data or cache.
    """
    password, signature, token, key, login = CANARIES
    for name, value in (("HF_TOKEN", token), ("AWS_SECRET_ACCESS_KEY", key), ("WANDB_API_KEY", login)):
        monkeypatch.setenv(name, value)
    with serving(files, drop=5, busy=7, login=f"me:{password}") as server:
        address = server.address.replace("//", f"//me:{password}@")
        names = (f"{address}/pairs/{{00000..00003}}.tar?sig={signature}", f"{address}/texts.jsonl?token={signature}")
        more = ("data.source.wait=0.01", "data.num_workers=2")
        config = run(tmp_path, "data=stream", *overrides(files, *names), *SMALL, *more)
        assert server.failed > 0
        assert server.sent("texts.jsonl") < 4 * (files / "texts.jsonl").stat().st_size
    one, other = (load_state(folder / "model.safetensors") for folder in (streamed, Path(config.run_dir)))
    assert all(torch.equal(one[name], other[name]) for name in one)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "settings.json", "summary.json", "data_account.json"} <= {path.name for path in written}
    for path in written:
        found = path.read_bytes() + str(path).encode()
        assert not [canary for canary in CANARIES if canary.encode() in found], path


def test_a_run_on_data_of_others_written_once(files: Path, tmp_path: Path) -> None:
    sources = overrides(files, f"{files}/pairs", f"{files}/texts.jsonl")
    config = run(tmp_path, "data=sources", *sources)
    account = read_json(Path(config.run_dir) / "data_account.json")
    assert account["sets"]["lm"] == {"good": 120, "bad": 1, "kinds": {"missing_key": 1}}
    assert (Path(config.run_dir) / "model.safetensors").is_file()
    tokens = read_json(Path(config.run_dir) / "summary.json")["tokens"]
    assert all(tokens[task] > 0 for task in ("t2i", "lm", "mmu"))


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_run_on_streams_has_the_bits_of_an_undisturbed_one(
    given: list[str], tmp_path: Path, workers: int
) -> None:
    chosen = (*given, f"data.num_workers={workers}", "data.micro_batches=2", "save_every=3", "evaluation.every=0")
    subject = Subject(chosen, tmp_path / "shared", tmp_path)
    seconds = subject.whole(tmp_path / "reference")
    early = seconds / 2  # the reference may have run beside other tests, and this may be faster
    hits, wrong = disturb(subject, tmp_path / "run", early, random.Random(workers), times=2)
    assert hits
    assert wrong + apart(tmp_path / "run", tmp_path / "reference") == []
    accounts = [(tmp_path / name / "data_account.json").read_bytes() for name in ("run", "reference")]
    assert accounts[0] == accounts[1]


@pytest.mark.slow
def test_streams_go_on_with_another_number_of_ranks(given: list[str], tmp_path: Path) -> None:
    chosen = (*given, "data.micro_batches=4", "save_every=5", "evaluation.every=0")
    subjects = [Subject(chosen, tmp_path / "shared", tmp_path, ranks=n) for n in (1, 2, 1)]
    subjects[0].whole(tmp_path / "reference")
    in_turns(subjects, tmp_path / "run", (5, 10, None))
    known = {line["step"]: set(line["batches"]) for _, line in lines(tmp_path / "reference")}
    seen: dict[int, set[str]] = {}
    for _, line in lines(tmp_path / "run"):
        seen.setdefault(line["step"], set()).update(line["batches"])
    assert seen == known


def test_the_config_of_the_documents_is_one(project_root: Path, tmp_path: Path) -> None:
    text = (project_root / "docs" / "data.md").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    changes = [change for change in re.findall(r"`([+~]\S+)`", text) if "weights" in change]
    config = compose(["experiment=symbiotic", f"hydra.searchpath=[file://{tmp_path}]", "data=mine", *changes])
    assert config.mix.weights == {"t2i": 3, "lm": 2, "mmu": 2, "captions": 3}
    assert config.data.sets == ("t2i", "captions", "lm", "mmu")
    for name, origin in parse_origins(config.data.source["sources"]).items():
        assert origin.format, name


@pytest.mark.parametrize(("task", "both"), [("t2i", True), ("mmu", False)])
def test_tasks_are_those_of_the_files_whatever_a_source_is_called(task: str, both: bool, files: Path) -> None:
    sources = f"{{pairs: {{format: img2dataset, files: '{files}/pairs', fit: crop, side: 8, task: {task}"
    sources += f"{', question: what' if task == 'mmu' else ''}}}, lm: {{format: text, files: '{files}/texts.jsonl'}}}}"
    overrides = ["experiment=smoke", "data=sources", f"data.source.sources={sources}", "data.row_tokens=64"]
    overrides += [f"data.source.tokenizer={files / 'tokenizer.json'}", "system=utamoe", "phases=none"]
    overrides += [f"~mix.weights.{name}" for name in ("t2i", "t2i_long", "mmu")] + ["+mix.weights.pairs=3"]
    overrides += ["~init.stage0.mix.weights.lm_unreplayed", "~init.stage0.mix.weights.mmu"]
    plain = [override for override in overrides if override not in ("system=utamoe", "phases=none")]
    if both:
        assert compose(overrides).system.task_router
        assert compose([*plain, "phases.shield_steps=1"]).phases.shield_steps == 1
        return
    with pytest.raises(ConfigError, match="the mix trains no generation samples"):
        compose([*plain, "phases.shield_steps=1"])
    with pytest.raises(ConfigError, match=r"system\.task_router=true: the mix trains understanding only"):
        compose(overrides)


def test_codes_of_images_that_nobody_has_seen_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"objective=autoregressive: needs codes of all images in advance"):
        compose(["experiment=smoke", *given, "objective=autoregressive_smoke"])
