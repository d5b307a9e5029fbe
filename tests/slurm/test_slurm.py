"""Jobs of a real SLURM of one node, which `make test-slurm` starts and stops: submitted, queued again, gone on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from equality import BASE, ROOT, difference, environment, folder_of, folders, trained
from symbiotic.callbacks.checkpoint import newest_step
from symbiotic.callbacks.csv_log import read_rows

pytestmark = pytest.mark.slurm
SHARED_OUT = ("trainer=fsdp", "trainer.expert_parallel=2")
JOB = ("hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=20")
PATIENCE = 400.0  # seconds


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """srun, sbatch and scontrol of this process, and of what it starts, mean a node of its own."""
    folder, script = tmp_path_factory.mktemp("slurm"), Path(__file__).with_name("one_node.sh")
    conf = folder / "slurm.conf"
    try:
        subprocess.run([script, "start", folder], check=True, stdout=subprocess.DEVNULL, timeout=600)
        os.environ["SLURM_CONF"] = str(conf)
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([script, "stop", folder], check=True, timeout=60)


def submit(overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`src/train.py -m`: it submits, and waits for the jobs."""
    arguments = [sys.executable, "src/train.py", "-m", *overrides, "seed=0", *JOB]
    with log.open("wb") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def output(runs: Path) -> str:
    """What the first process of the job has printed."""
    return "\n".join(path.read_text() for path in sorted(runs.rglob("*_0_log.*")))


def queued() -> list[str]:
    """The jobs that wait or run, by their ids."""
    return subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout.split()


def wait(what: str, holds: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()[-2000:]}"
        time.sleep(0.2)


def test_a_job_of_two_processes_trains_to_its_end(shared_tmp: Path, tmp_path: Path) -> None:
    few = ["phases.steps=3", "phases.shield_steps=2", "data.micro_batches=4", "evaluation.every=0"]
    one = trained(0, [*BASE, *few, *folders(shared_tmp, tmp_path / "one", shared_tmp / "cache")])
    arguments = [*BASE, *few, *SHARED_OUT, *folders(shared_tmp, tmp_path / "job", shared_tmp / "cache")]
    run, process = folder_of(arguments), submit(arguments, tmp_path / "log")
    assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    wait("it ends", lambda: not queued(), tmp_path / "log")
    said = output(tmp_path / "job")
    assert (run / "summary.txt").is_file(), said
    assert "srun" not in said, "no advice on how to start jobs"
    assert difference(one, run)["train/"] < 1e-5


def tell(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def queue_again(job: str) -> None:
    """What a preemption does."""
    tell("scontrol", "requeue", job)


def come_near_the_limit(job: str) -> None:
    """SLURM looks at limits every 30 seconds; its job stands still until it has. The new limit is `signal_delay_s`."""
    tell("scancel", "--signal=STOP", job)
    tell("scontrol", "update", f"jobid={job}", "timelimit=2")
    time.sleep(35)
    tell("scontrol", "update", f"jobid={job}", "timelimit=20")
    tell("scancel", "--signal=CONT", job)


@pytest.mark.parametrize(("meet", "signal"), [(queue_again, "SIGTERM"), (come_near_the_limit, "SIGUSR2")])
def test_a_job_stops_with_a_checkpoint_is_queued_again_and_goes_on(
    meet: Callable[[str], None], signal: str, shared_tmp: Path, tmp_path: Path
) -> None:
    long = ["phases.steps=24", "phases.shield_steps=6", "save_every=100", "evaluation.every=0"]
    whole = trained(0, [*BASE, *long, *folders(shared_tmp, tmp_path / "one", shared_tmp / "cache")])
    arguments = [*BASE, *long, *SHARED_OUT, *folders(shared_tmp, tmp_path / "job", shared_tmp / "cache")]
    run, process = folder_of(arguments), submit(arguments, tmp_path / "log")

    def steps() -> int:
        rows = read_rows(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
        return max((int(row["step"]) for row in rows), default=0)

    wait("the job trains", lambda: steps() >= 4, tmp_path / "log")
    (job,) = queued()
    meet(job)
    wait("it stops", lambda: newest_step(run / "checkpoints") > 0, tmp_path / "log")
    stopped = newest_step(run / "checkpoints")
    assert 4 <= stopped < 24
    wait("it goes on to its end", lambda: (run / "summary.txt").is_file(), tmp_path / "log")
    process.wait(PATIENCE)
    wait("it ends", lambda: not queued(), tmp_path / "log")
    said = output(tmp_path / "job")
    assert said.count(f"{signal}: stopping after this step") == 1
    assert "the job goes on from the newest checkpoint when it is queued again" in said
    assert max(difference(whole, run).values()) < 1e-5
