"""`python src/export_hf.py run=…`: a run as a folder that transformers loads: config, weights in shards, model card.

This file reads the command line and writes the card; `convert/join.py` puts the pools together and
`convert/huggingface.py` writes the tensors. torch is imported when there is something to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.convert.families import FAMILIES, Family
from symbiotic.files import read_json, write_json, write_text
from symbiotic.schema import Config, ConfigError, RunError, near_miss
from symbiotic.studies.request import check_weights_choice, command, flag, parse_request, run_folder, whole

USAGE = """\
python src/export_hf.py run=FOLDER [key=value ...]

Writes a run as a Hugging Face checkpoint: config.json, safetensors with their index, and a README.md with where it
comes from and its scores. The pools are put together in the order that the experts had before the split, so the model
is the run's with its masks off. Read and generated images are left out: no such family has them.

  run=FOLDER       the folder of a run (it holds config.yaml)
  out=FOLDER       where to write (default: hf in the run folder)
  family=NAME      of a run that did not start from a checkpoint: olmoe, qwen2_moe, qwen3_moe, dots1, ernie4_5_moe
  shard=MB         size of a file of weights (default: 5120)
  checkpoint=FILE  weights, .safetensors or .ckpt (default: those that the run ended with)
  step=N           the checkpoint of this optimiser step; 0: what joint training started from
  ema=true         the averaged weights that the run ended with

python src/export_hf.py run=runs/symbiotic/symbiotic-…-seed0
"""


READ = {"step": whole, "ema": flag, "shard": whole}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    run: str
    out: str | None = None
    family: str | None = None
    shard: int = 5120
    checkpoint: str | None = None
    step: int | None = None
    ema: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return command(USAGE, act, arguments)


def act(arguments: Sequence[str]) -> None:
    request = parse_request(Request, arguments, READ)
    check_weights_choice(request.checkpoint, request.step, request.ema)
    if request.shard < 1:
        raise ConfigError(f"shard={request.shard}: must be at least 1")
    folder = run_folder(request.run)
    out = Path(request.out) if request.out else folder / "hf"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is there already; must be a new folder, or an empty one")
    print(export(folder, out, request))


def family_of_run(asked: str | None, origin: Mapping[str, Any] | None, folder: Path) -> Family:
    """Raises ConfigError: a family that does not exist, or none where the run does not tell."""
    known = {family.model_type: family for family in FAMILIES.values()}
    if asked is not None and asked not in known:
        raise ConfigError(f"family={asked}: no such family; {near_miss(asked, known)}")
    if origin is not None:
        own = FAMILIES[origin["architecture"]]
        if asked not in (None, own.model_type):
            raise ConfigError(f"family={asked}: {folder} started from {own.architecture}; leave family away")
        return own
    if asked is None:
        raise ConfigError(f"family: missing; {folder} started from no checkpoint that could tell; see --help")
    return known[asked]


def export(folder: Path, out: Path, request: Request) -> str:
    """Writes the folder; returns the line that says so.

    Raises:
        ConfigError: the family cannot be this model. RunError: the system is not one model with its masks off, or the
        weights have low-rank updates beside them.
    """
    import torch

    from symbiotic.convert.huggingface import parent_layout, places, swap_rows, write_checkpoint
    from symbiotic.convert.join import joined
    from symbiotic.models.lora import is_lora
    from symbiotic.models.unified import UnifiedModel
    from symbiotic.runs import load_state
    from symbiotic.trained import PRETRAINED, read_config, weights_file

    config, path = read_config(folder), weights_file(folder, request.checkpoint, request.step, request.ema)
    origin, receipt = read_json(folder / PRETRAINED), read_json(folder / "receipt.json")
    family = family_of_run(request.family, origin, folder)
    if receipt is None:
        raise RunError(f"{folder / 'receipt.json'}: no such file; it says which expert was which before the split")
    state = load_state(path)
    if any(map(is_lora, state)):
        raise RunError(f"{path}: low-rank updates are not added to their weights; src/merge_lora.py does that")
    with torch.device("meta"):
        shapes = UnifiedModel(config.model, parent_layout(config.model), latents=False).state_dict()
    wanted = {place.ours for place in places(family, config.model)}
    names = {name: empty.shape for name, empty in shapes.items() if name in wanted}
    rows = (origin or {}).get("token_rows")
    back = [(theirs, own) for own, theirs in rows or ()]
    parent = swap_rows(joined(state, names, config.system, receipt["experts"]), back)
    source = origin["config"] if origin else None
    files = write_checkpoint(out, parent, config.model, family, source, limit=request.shard * 2**20)
    summary = read_json(folder / "summary.json") if request.checkpoint is None and request.step is None else None
    left = sorted({name.split(".")[0] for name in state if not any(name.startswith(p) for p in KEPT)})
    tokens = write_tokens(folder, out, own=rows is not None)
    write_text(out / "README.md", card(config, family, origin, receipt, summary, path.name, left, tokens))
    return f"{out}: {family.architecture} in {len(files)} file{'s' * (len(files) > 1)} from {path}"


def write_tokens(folder: Path, out: Path, own: bool) -> str:
    """The tokenizer beside the weights; returns what the card says of it. own: the pretrained model's, as it was."""
    from symbiotic.convert.disk import copy_tokens
    from symbiotic.trained import PRETRAINED_TOKENS, TOKENIZER

    if own and (names := copy_tokens(folder / PRETRAINED_TOKENS, out)):
        return f"The tokenizer is that of the pretrained model, unchanged ({', '.join(names)})."
    if own or not (folder / TOKENIZER).is_file():
        return "The tokenizer is not in this folder: the run has lost its copy."
    write_text(out / TOKENIZER, (folder / TOKENIZER).read_text(encoding="utf-8"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    specials = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    write_json(out / "tokenizer_config.json", {**about, **specials})
    return "The tokens are those of the run's corpus, not of the pretrained model; a sequence begins with `<bos>`."


KEPT = ("embed.", "blocks.", "norm.", "text_head.")


def card(
    config: Config,
    family: Family,
    origin: Mapping[str, Any] | None,
    receipt: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    weights: str,
    left: Sequence[str],
    tokens: str,
) -> str:
    """The model card: what it is, where it comes from, what is not in it, and the run's scores."""
    made = receipt["provenance"]
    start = Path(origin["folder"]).name if origin else receipt["parent"]
    pools = ", ".join(f"{name} {len(experts)}" for name, experts in receipt["experts"][0].items())
    what = (
        f"Weights `{weights}` of a run of symbiotic, system `{config.system.name}`, seed {config.seed}, "
        f"{config.phases.steps} steps of joint training on understanding and generation, from `{start}`."
    )
    masks = (
        f"- Experts of the first layer by pool: {pools}. Here they stand in one pool, in their order before the split, "
        "and every token chooses among all: the run's model with its masks off, not the one that was measured."
    )
    lines = [
        *("---", "library_name: transformers", "tags: [moe, symbiotic]", "---", ""),
        *(f"# {config.name}: {family.architecture}", "", what, "", masks),
        f"- Left out, as {family.architecture} has no place for them: {', '.join(left) or 'nothing'}.",
        f"- {tokens}",
        f"- Code {made['code']}, commit {made['commit']}, torch {made['torch']}.",
    ]
    change = (receipt.get("masks_off") or {}).get("max_logit_change")
    lines += [f"- Split: largest change of a logit with the masks off {change:.1e}."] if change is not None else []
    if summary is None:
        return "\n".join([*lines, "", "No scores: these are not the weights that a finished run ended with."]) + "\n"
    anchors = summary["anchors"]["stage 0"]
    table = [
        f"| {name} | {_number(anchors.get(name))} | {_number(value)} | {summary['n'].get(name, '–')} |"
        for name, value in summary["scores"].items()
    ]
    head = ["", "## Scores of the run, masks on", "", "| score | parent | end | n |", "|---|---|---|---|"]
    return "\n".join([*lines, *head, *table]) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = value[0]
    return "–" if value is None else f"{value:.4g}"
