"""The router inspector: its numbers are those of the model, and its page is whole, escaped and self-contained."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inspected import run_folder
from symbiotic.data.errors import DataError
from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import build_sample
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.prompts import caption_samples, one_a_row, pictures
from symbiotic.generation.images import start_noise
from symbiotic.layout import parent_system
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.runs import load_state
from symbiotic.schema import Config, ConfigError, RunError
from symbiotic.studies import console
from symbiotic.studies.inspection import READ, Request, inspect, slug
from symbiotic.studies.inspection_html import page
from symbiotic.studies.inspection_text import report
from symbiotic.studies.inspection_trace import Inspection, by_kind, numbers, trace
from symbiotic.studies.request import parse_request
from symbiotic.trained import read_config, weights_file

CAPTION = "red 7 on gray bar left"
QUESTION = "what number is it ?"


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "run"
    run_folder(shared_tmp, folder)
    return folder


@pytest.fixture(scope="module")
def image(run: Path) -> str:
    path = run / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(path)
    return str(path)


def request(run: Path, prompt: str = QUESTION, **more: Any) -> Request:
    return Request(run=str(run), prompt=prompt, **more)


def generation(run: Path, **more: Any) -> Request:
    return request(run, CAPTION, task="generation", **more)


def corpus(config: Config) -> Path:
    return next(path.parent for path in Path(config.paths.data).glob("*/tokenizer.json"))


def text_of(inspection: Inspection, *args: Any) -> str:
    return console.render(*report(inspection, *args))


# --------------------------------------------------------------------------- the numbers


def check_numbers(found: dict[str, Any], out: Any) -> None:
    """inspection.json against `model(batch, trace=True)`."""
    assert len(found["layers"]) == len(out.trace) == 2
    for layer, want in zip(found["layers"], out.trace, strict=True):
        assert layer["experts"] == want.experts_NK.tolist()
        assert np.allclose(layer["gates"], want.gates_NK, atol=1e-6)
        assert np.allclose(layer["probabilities"], want.probs_NE, atol=1e-6)
        routed, shared = want.routed_ND.norm(dim=-1), want.shared_ND.norm(dim=-1)
        assert np.allclose(layer["routed"], routed, atol=1e-5)
        assert np.allclose(layer["shared"], shared, atol=1e-5)
        assert np.allclose(layer["share"], shared / (shared + routed), atol=1e-5)
        assert min(layer["share"]) > 0
        assert max(layer["share"]) < 1
        assert np.allclose(np.sum(layer["gates"], 1), 1, atol=1e-5)
        entropy = -(want.probs_NE * want.probs_NE.clamp(min=1e-30).log()).sum(-1) / np.log(4)
        assert np.allclose(layer["entropy"], entropy, atol=1e-5)


@torch.no_grad()
def test_the_numbers_of_a_reading_are_those_of_a_direct_call(run: Path, image: str) -> None:
    config = read_config(run)
    paths = inspect(request(run, image=image))
    assert [path.name for path in paths] == ["inspection.txt", "inspection.html", "inspection.json"]
    assert paths[0].parent.parent == run / "inspection"
    found = json.loads(paths[2].read_text())
    tokenizer = Tokenizer.load(corpus(config) / "tokenizer.json")
    with Image.open(image) as file:
        sample = build_sample("x", "mmu", reading_parts(np.asarray(file), QUESTION, tokenizer))
    model = UnifiedModel(config.model, config.system)
    model.load_state_dict(load_state(run / "model.safetensors"))
    check_numbers(found, model.eval()(one_a_row([sample]), trace=True))
    kinds = [token["kind"] for token in found["tokens"]]
    assert kinds == ["text"] * 2 + ["vit"] * 15 + ["text"] * 6
    assert [token["word"] for token in found["tokens"]][-5:] == QUESTION.split()
    assert found["tokens"][2 + 7]["grid"] == [1, 2]


@torch.no_grad()
def test_the_numbers_of_a_generation_are_those_of_a_direct_call(run: Path) -> None:
    """The image that the model draws, mixed with the noise that it started from."""
    config = read_config(run)
    found = numbers(trace(generation(run, time=0.75, seed=3)))
    tokenizer = Tokenizer.load(corpus(config) / "tokenizer.json")
    model = UnifiedModel(config.model, config.system)
    model.load_state_dict(load_state(run / "model.safetensors"))
    model.eval()
    drawn = pictures(model, [CAPTION], tokenizer, config.objective, size=(20, 20), seed=3).numpy()
    samples = caption_samples([CAPTION], (20, 20), tokenizer, drawn)
    noise = start_noise(3, [0], *samples[0].latents.shape).numpy()
    check_numbers(found, model(noised(one_a_row(samples, [0.75], list(noise))), trace=True))
    assert [token["kind"] for token in found["tokens"]] == ["prompt"] * 8 + ["vae"] * 25


def test_a_latent_uses_no_understanding_expert_and_a_word_no_generation_expert(run: Path) -> None:
    found = numbers(trace(generation(run)))
    assert found["experts"] == ["und0", "und1", "und2", "und3", "gen0", "gen1", "gen2", "gen3"]
    for layer in found["layers"]:
        for token, experts in zip(found["tokens"], layer["experts"], strict=True):
            pools = {found["experts"][expert][:3] for expert in experts}
            assert pools == ({"gen"} if token["kind"] == "vae" else {"und"})


def test_flow_time_and_seed_and_image_decide_what_the_latents_are(run: Path, image: str) -> None:
    def routed(**more: Any) -> Any:
        return numbers(trace(generation(run, **more)))["layers"][0]["routed"]

    base = routed(time=0.5, seed=0)
    assert base == routed(time=0.5, seed=0)
    assert base[:8] == routed(time=0.9, seed=0)[:8]  # words do not see the latents behind them
    for change in ({"time": 0.9, "seed": 0}, {"time": 0.5, "seed": 1}):
        assert base[8:] != routed(**change)[8:]
    assert len(routed(image=image)) == 8 + 15
    assert routed(image=image, time=0.0, seed=0) == routed(image=image, time=0.0, seed=1)  # at 0 there is no noise


def test_the_same_request_gives_the_same_bytes(run: Path, image: str, tmp_path: Path) -> None:
    for more in ({"image": image}, {"task": "generation", "against": "init"}):
        one, two = (inspect(request(run, CAPTION, out=str(tmp_path / name), **more)) for name in ("one", "two"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_the_summary_by_kind(run: Path) -> None:
    inspection = trace(generation(run))
    found = {(summary.kind, summary.block): summary for summary in by_kind(inspection)}
    assert list(found) == [("prompt", 0), ("prompt", 1), ("vae", 0), ("vae", 1)]
    vae = found["vae", 1]
    assert vae.tokens == 25
    assert vae.share == pytest.approx(float(inspection.layers[1].share_N[8:].mean()))
    assert sum(share for _, share in vae.used) == pytest.approx(1)
    counts = {inspection.experts[e]: n for e, n in enumerate(inspection.layers[1].experts_NK[8:].flatten().bincount())}
    assert {name: round(share * 50) for name, share in vae.used} == {n: int(c) for n, c in counts.items() if c}


# --------------------------------------------------------------------------- which weights


@torch.no_grad()
def test_weights_by_default_step_or_path(run: Path) -> None:
    def gates(**more: Any) -> Any:
        return numbers(trace(request(run, **more)))["layers"][0]["gates"]

    end, start, half = gates(), gates(step=0), gates(step=10)
    assert end != start != half != end
    assert half == gates(checkpoint=str(run / "checkpoints" / "step=000010.ckpt"))
    with pytest.raises(RunError, match=r"step=000011\.ckpt: no such checkpoint; steps that were kept: 10, and 0"):
        gates(step=11)
    with pytest.raises(RunError, match=r"nowhere\.safetensors: no such checkpoint"):
        gates(checkpoint="nowhere.safetensors")


def test_a_run_that_was_stopped_shows_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "stopped", ignore=shutil.ignore_patterns("model.safetensors"))
    assert weights_file(tmp_path / "stopped").name == "step=000010.ckpt"
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")
    with pytest.raises(RunError, match=r"model\.safetensors: no such file, and no checkpoint either; the run's own"):
        weights_file(tmp_path / "stopped")
    (tmp_path / "stopped" / "init.safetensors").unlink()
    with pytest.raises(RunError, match=r"init\.safetensors: no such file; the run's own command writes it again"):
        weights_file(tmp_path / "stopped", step=0)


def test_weights_of_another_model_are_one_line(run: Path, shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "dense", "system=dense")
    with pytest.raises(RunError, match=r"not weights of the model in config\.yaml \(Missing key"):
        trace(request(run, checkpoint=str(tmp_path / "dense" / "model.safetensors")))


def test_a_parent_understands_and_draws_nothing(run: Path, tmp_path: Path) -> None:
    """A cached stage 0: one pool, no latent projections."""
    import dataclasses

    from symbiotic.config import save_config
    from symbiotic.runs import save_state

    config = read_config(run)
    system = parent_system(config.system)
    save_config(dataclasses.replace(config, system=system), tmp_path / "config.yaml")
    save_state(
        tmp_path / "parent.safetensors", UnifiedModel(config.model, system, latents=False).initialise(0).state_dict()
    )
    assert {name for names in (trace(request(tmp_path)).experts,) for name in names} == {f"all{i}" for i in range(8)}
    with pytest.raises(ConfigError, match="understanding-only parent"):
        trace(generation(tmp_path))


# --------------------------------------------------------------------------- compared with the start


def test_routing_is_compared_on_the_same_tokens(run: Path) -> None:
    found = numbers(trace(generation(run, against="init")))
    own, start = (numbers(trace(generation(run, image=None, **more)))["layers"] for more in ({}, {"step": 0}))
    for layer, mine, before in zip(found["layers"], own, start, strict=True):
        sets = [sorted(a) != sorted(b) for a, b in zip(mine["experts"], before["experts"], strict=True)]
        assert layer["changed"][:8] == sets[:8]  # the words; the images differ, for each of the two draws its own
        assert any(layer["changed"])
    changed = {(kind["kind"], kind["block"]): kind["changed"] for kind in found["kinds"]}
    assert changed["prompt", 0] == pytest.approx(np.mean(found["layers"][0]["changed"][:8]))
    same = numbers(trace(generation(run, against=str(run / "model.safetensors"))))
    assert not any(any(layer["changed"]) for layer in same["layers"])
    assert "changed" not in own[0]


# --------------------------------------------------------------------------- other systems


def test_a_dense_system_says_that_nothing_is_routed(shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "run", "system=dense")
    inspection = trace(request(tmp_path / "run"))
    found = numbers(inspection)
    assert found["layers"] == []
    assert found["blocks_without_routed_experts"] == [{"block": 0, "share": 1.0}, {"block": 1, "share": 1.0}]
    line = "dense has no routed experts: nothing is routed, and the shared share is 1 in every block."
    assert line in text_of(inspection)
    assert line in page(inspection)
    assert "<table" not in page(inspection)


def test_layers_without_experts_and_systems_without_shared_experts(shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "mixed", "model.dense_layers=[0]", "model.dense_hidden=48")
    mixed = trace(request(tmp_path / "mixed"))
    assert [layer.block for layer in mixed.layers] == [1]
    assert "where the shared share is 1: 0" in text_of(mixed)
    run_folder(shared_tmp, tmp_path / "bare", "ablation=no_shared_ever")
    bare = trace(request(tmp_path / "bare"))
    assert not any(bool(layer.share_N.any()) for layer in bare.layers)
    assert "has no shared experts for these tokens: the shared share is 0" in text_of(bare)


def test_several_gates_on_one_pool_name_the_same_experts(shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "run", "system=multi_gate")
    found = numbers(trace(generation(tmp_path / "run")))
    assert found["experts"] == [f"all{i}" for i in range(8)]
    assert np.allclose(np.sum(found["layers"][0]["probabilities"], 1), 1, atol=1e-5)


# --------------------------------------------------------------------------- text


def test_the_grid_names_experts_and_gates(run: Path, image: str) -> None:
    inspection = trace(request(run, image=image))
    text = text_of(inspection)
    layer = inspection.layers[0]
    gate, order = layer.gates_NK[-1].sort(descending=True)
    first = inspection.experts[int(layer.experts_NK[-1][order[0]])]
    row = next(line for line in text.splitlines() if line.strip().startswith("?"))
    assert f"{first} {float(gate[0]):.2f}".replace(" 0.", " .") in row
    assert "15 patches" in text
    assert "patch 0,0" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_rows_and_patches(run: Path, image: str) -> None:
    inspection = trace(request(run, image=image))
    few = text_of(inspection, 3)
    assert "6 more rows: rows=9 shows them" in few
    assert "number" not in few.split("Share of")[0].split("Routing")[1]
    every = text_of(inspection, 99, True)
    assert all(f"patch {row},{column}" in every for row in range(3) for column in range(5))


def test_many_layers_are_split_over_tables(shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "run", "model.num_layers=9", "model.router.top_k=4")
    text = text_of(trace(request(tmp_path / "run")))
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("Routing") == 3
    assert all(f"layer {block}" in text for block in range(9))
    assert "…" not in text
    assert " +1" in text  # of four experts a cell names three


def test_markup_in_a_prompt_is_printed_as_it_is(run: Path) -> None:
    text = text_of(trace(request(run, "[red]what[/red] number")))
    assert "'[red]what[/red] number'" in text
    assert "all <unk> to the model: [ ] /" in text


# --------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Whether every tag is closed, and everything that points somewhere."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_the_page_is_whole_and_self_contained(run: Path, image: str, task: str) -> None:
    attack = "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> & </title></style>"
    text = page(trace(request(run, attack, task=task, against="init", image=image)))
    parsed = Page(text)
    assert parsed.open == []
    assert attack in parsed.words
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert parsed.tags.count("img") == 1
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not re.search(r"https?:|@import|url\(", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text


def test_every_token_and_layer_has_a_cell_that_says_what_happened(run: Path) -> None:
    inspection = trace(request(run, "what number <is> it ?"))
    text = page(inspection)
    titles = re.findall(r'<td tabindex="0" title="([^"]*)"', text)
    assert len(titles) == len(inspection.tokens) * len(inspection.layers)
    layer = inspection.layers[1]
    last = titles[-1].splitlines()
    assert last[0] == "? (text, place 7), layer 1"
    expert = inspection.experts[int(layer.experts_NK[-1, 0])]
    probability = float(layer.probs_NE[-1, layer.experts_NK[-1, 0]])
    assert f"{expert}: gate {float(layer.gates_NK[-1, 0]):.3f}, probability {probability:.3f}" in last
    assert f"shared {float(layer.shared_N[-1]):.3g}, routed {float(layer.routed_N[-1]):.3g}" in last[-1]
    assert 'id="v-share"' in text
    assert 'id="v-changed"' not in text


def test_colours_are_those_of_the_pools(run: Path) -> None:
    inspection = trace(generation(run))
    for row in re.findall(r'<tr><th scope="row" title.*?</tr>', page(inspection), re.DOTALL):
        assert set(re.findall(r'<i class="(p\d)"', row)) == ({"p1"} if "<td>vae</td>" in row else {"p0"})


# --------------------------------------------------------------------------- what can be wrong


def test_images_that_cannot_be_taken_are_one_line(run: Path, tmp_path: Path) -> None:
    for size, line in (((12, 21), "12 x 21 pixels; sides must be multiples of 4"), ((12, 400), "at most 64 pixels")):
        path = tmp_path / f"{size[1]}.png"
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)
        with pytest.raises(DataError, match=line):
            trace(request(run, image=str(path)))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="not a readable image"):
        trace(request(run, image=str(tmp_path / "text.png")))


def test_a_corpus_that_is_gone_is_named_and_not_written(shared_tmp: Path, tmp_path: Path) -> None:
    run_folder(shared_tmp, tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    moved = text.replace(str(shared_tmp / "data"), str(tmp_path / "gone"))
    (tmp_path / "run" / "config.yaml").write_text(moved)
    with pytest.raises(RunError, match=r"gone/\w+/tokenizer\.json: no such file; .* data=FOLDER"):
        trace(request(tmp_path / "run"))
    assert not (tmp_path / "gone").exists()
    assert trace(request(tmp_path / "run", data=str(shared_tmp / "data"))).layers


def test_a_config_of_other_code_is_one_line(run: Path, tmp_path: Path) -> None:
    for text in ("modle: 3\n", "seed: [\n", "3\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunError, match=r"config\.yaml: not the config of a run of this code"):
            read_config(tmp_path)


def test_folders_are_readable_and_differ_by_what_was_asked(run: Path) -> None:
    one = slug(generation(run), "model.safetensors")
    assert re.fullmatch(r"generation-red-7-on-gray-bar-left-[0-9a-f]{6}", one)
    assert one == slug(generation(run), "model.safetensors")
    others = [
        slug(generation(run, **m), "model.safetensors") for m in ({"seed": 1}, {"time": 0.1}, {"against": "init"})
    ]
    assert len({one, *others, slug(generation(run), "init.safetensors")}) == 5
    assert slug(request(run, "§ ?!"), "").startswith("understanding-")
    assert "/" not in slug(request(run, "../../etc"), "")


def test_values_are_read_from_text(run: Path) -> None:
    asked = parse_request(
        Request, [f"run={run}", "prompt=a=b", "time=.25", "seed=3", "all=True", "step=10", "rows=7"], READ
    )
    assert (asked.prompt, asked.time, asked.seed, asked.all, asked.step, asked.rows) == ("a=b", 0.25, 3, True, 10, 7)
