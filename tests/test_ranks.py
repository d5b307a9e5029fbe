"""Who started the processes of a run, and what is refused before any of them trains."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import get_args_parser

from symbiotic.config import compose
from symbiotic.files import commit_folder, described, manifest_of, sweep, uncommitted, writing
from symbiotic.launch import WRONG_CONFIG, launch
from symbiotic.ranks import Ranks, started
from symbiotic.schema import ConfigError
from symbiotic.training.optimizer_state import by_name, named, numbered, restore

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NNODES": "1"}
FSDP = "trainer=fsdp"
WRONG = {  # under TORCHRUN, 8 ranks on 2 nodes: overrides -> what the line says
    "experiment=smoke": r"trainer\.devices=1: torchrun started 8 processes; take trainer=fsdp or trainer=ddp",
    FSDP: r"data\.micro_batches=1: must be a multiple of the 8 devices",
    f"{FSDP} data.micro_batches=8 trainer.devices=2": r"trainer\.devices=2: torchrun started 8 processes",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=3": r"expert_parallel=3: must divide the 8 ranks",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=8 model.gen_fraction=.75": r"expert_parallel=8: must divide "
    r"the experts of every pool, and und has 4",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=0": r"expert_parallel=0: must be a whole number",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=2 system=dense": r"system=dense has no routed experts",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=2 lora=r16 lora.rank=6": r"lora\.rank=6: must be a multiple",
    f"{FSDP} data.micro_batches=8 trainer.expert_parallel=2 model.width=130": r"model\.width=130: must be a multiple",
    f"{FSDP} data.micro_batches=8 trainer.precision=16-mixed": r"trainer\.precision=16-mixed: must be 32-true or bf16",
    f"{FSDP} data.micro_batches=8 surgery=maop": r"surgery\.method=maop: takes whole gradients",
    f"{FSDP} data.micro_batches=8 callbacks.collapse_alarm.action=revive": r"action=revive: copies experts",
    f"{FSDP} data.micro_batches=8 callbacks.gradient_conflict.every=9": r"gradient_conflict\.every=9: has no effect",
    "trainer=ddp data.micro_batches=8 +trainer.expert_parallel=2": r"expert_parallel=2: needs trainer=fsdp",
    "-m experiment=smoke seed=0,1": r"-m: torchrun started 8 processes, which is for one run",
    "study=smoke": r"study=smoke: torchrun started 8 processes, which is for one run",
}


def test_what_started_the_processes_is_read_from_the_environment() -> None:
    assert started({}) is None
    assert started(TORCHRUN) == Ranks("torchrun", 3, 8, 2)
    assert started(SRUN) == Ranks("srun", 1, 4, 1)
    assert started(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is None, "alone, whoever started it"
    assert started(SCRIPT) is None, "the script of a job is one process, however many tasks the job asks for"
    assert Ranks("srun", 0, 8, 2).per_node == 4


@pytest.mark.parametrize("line", WRONG)
def test_what_many_processes_cannot_do_is_one_line(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (TORCHRUN | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert launch(get_args_parser().parse_args(line.split())) == WRONG_CONFIG
    assert re.search(rf"^error: [^\n]*{WRONG[line]}[^\n]*\n$", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "5")
    assert launch(get_args_parser().parse_args(line.split())) == WRONG_CONFIG
    assert capsys.readouterr().err == "", "the others leave the line to the first"


def test_the_trainers_take_as_many_processes_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = compose(["experiment=smoke", FSDP])
    with pytest.raises(
        ConfigError, match=r"trainer\.devices=2: .*must be run by torchrun --nproc-per-node 2 src/train"
    ):
        compose(["experiment=smoke", FSDP, "trainer.devices=2"])
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for trainer in ("fsdp", "ddp"):
        config = compose(["experiment=smoke", f"trainer={trainer}", "data.micro_batches=8"])
        assert (config.trainer["devices"], config.trainer["num_nodes"]) == (4, 2)
    spread = compose(["experiment=smoke", FSDP, "trainer.expert_parallel=2", "data.micro_batches=8"])
    monkeypatch.undo()
    assert spread.run_dir == compose(["experiment=smoke", FSDP, "data.micro_batches=8"]).run_dir
    assert alone.trainer["devices"] == 1


# --------------------------------------------------------------------------- files and states


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "step=000001.ckpt"
    for text in ("old", "new"):
        temporary = writing(path)
        temporary.mkdir()
        (temporary / "part").write_text(text)
        files = described([temporary / "part"])
        assert uncommitted(path) is None or text == "old"
        commit_folder(temporary, path, {"step": 1, "files": files})
        assert uncommitted(path) is None
        assert (path / "part").read_text() == text
    (path / "part").write_text("NEW")
    assert uncommitted(path) == "part: its checksum is not that of what was written"
    manifest_of(path).unlink()
    assert "its writing did not come to an end" in str(uncommitted(path))
    litter = tmp_path / ".step=000002.ckpt.999999999.writing"
    litter.mkdir()
    (litter / "part").write_text("half")
    assert sweep(tmp_path) == [litter]
    assert not litter.exists()


def test_an_optimisers_state_goes_by_name_and_back() -> None:
    """Two roles; the second is in two groups, as parameters on two meshes are, and out of order."""
    a, b, c = (torch.nn.Parameter(torch.full((2,), float(i))) for i in range(3))
    names: dict[torch.Tensor, str] = {a: "a", b: "b", c: "c"}
    split = [{"params": [a], "role": "x"}, {"params": [c], "role": "y"}, {"params": [b], "role": "y"}]
    plain = [{"params": [a], "role": "x"}, {"params": [b, c], "role": "y"}]
    made = []
    for groups in (split, plain):
        optimizer = torch.optim.AdamW(copy.copy(groups), lr=0.1)
        for step in range(2):
            for parameter in (a, b, c):
                parameter.grad = torch.full((2,), float(names[parameter] == "b") + step)
            optimizer.step()
        made.append(optimizer)
    state = named(made[0], names)
    assert [group["names"] for group in state["groups"]] == [["a"], ["b", "c"]]
    expected = made[1].state_dict()
    found = numbered(state)
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    assert all(torch.equal(found["state"][n][field], v) for n, s in expected["state"].items() for field, v in s.items())
    assert by_name(found, [["a"], ["b", "c"]]) == state
    other = torch.optim.AdamW(copy.copy(split), lr=0.7)
    restore(other, by_name(expected, [["a"], ["b", "c"]]), names)
    assert [group["lr"] for group in other.param_groups] == [0.1] * 3
    assert all(torch.equal(other.state[p]["exp_avg"], made[1].state[p]["exp_avg"]) for p in (a, b, c))
