"""What `src/train.py` does: read the command line, validate every run, then let Hydra launch them.

A run is launched by Hydra's own launcher (basic, joblib, submitit); `job` is what runs there. An expected failure is
one line on stderr and leaves the other members of a multirun alone.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from symbiotic.allocator import keep_freed_memory
from symbiotic.checks.paths import check_paths
from symbiotic.checks.rules import plain
from symbiotic.claim import claimed
from symbiotic.config import CONF, Composer, load, search_too, spelled_out
from symbiotic.hints import explain
from symbiotic.ranks import planned, started
from symbiotic.redact import redacted, redacted_text
from symbiotic.schema import CollapseStop, Config, ConfigError, RunError
from symbiotic.stop import WARNINGS, Stopped, at_once, handled
from symbiotic.studies.member import run_member

WRONG_CONFIG, FAILED, INTERRUPTED = 2, 1, 130
_EXPECTED = (
    "ConfigError",
    "RunError",
    "Claimed",
    "OverBudget",
    "CollapseStop",
    "DataError",
    "CheckpointError",
)  # some modules import torch


class Failure(float):
    """What a failed job returns to a sweeper: not a number, and the exit status."""

    status: int

    def __new__(cls, value: float = float("nan"), status: int = FAILED) -> Failure:
        failure = super().__new__(cls, value)
        failure.status = status
        return failure


ENDED = "another process of this run ended; the same command goes on from the newest checkpoint"

_FAILURES: list[Failure] = []  # of jobs in this process, for sweepers that return nothing


def job(cfg: DictConfig) -> float:
    """One run: the typed config, the arc, its metric. Called by Hydra's launcher, maybe in another process."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    task = [str(o) for o in hydra.overrides.task]
    member = f" ({' '.join(task)})" if str(hydra.mode).endswith("MULTIRUN") else ""
    try:
        raw = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(raw, dict)
        config = load(raw, dict(hydra.runtime.choices), task)  # type: ignore[arg-type]
        with handled(at_once):  # a launcher's process has handlers of its own
            act = partial(run_arc, member=member)
            return run_member(config, act) if (config.study or {}).get("member") else act(config)
    except Stopped as stopped:
        if "submitit" not in str(hydra.launcher._target_):
            raise
        say(f"{stopped}; the job goes on from the newest checkpoint when it is queued again")
        queue_again(stopped)
        sys.exit(stopped.status)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if line:
            complain(line, member)
        _FAILURES.append(Failure(status=status_of(error)))
        return _FAILURES[-1]


def complain(line: str, member: str) -> None:
    print(redacted_text(f"error: {line}{member}"), file=sys.stderr, flush=True)


@contextmanager
def together(member: str) -> Iterator[None]:
    """Inside, the processes of a run complain of what all of them meet once: the first that has it says it, for others
    may be stuck. A line that only one of them has is said by that one.

    Raises:
        Elsewhere: instead of what one line explains, when that was said.
    """
    from symbiotic.team import Elsewhere, size, unsaid

    try:
        yield
    except Exception as error:
        line = one_line(error)
        if size() == 1 or not line:
            raise
        with handled(lambda number: None):  # the end of another process ends this one, but not before it has spoken
            if unsaid(line, alone=line == ENDED):
                complain(line, member)
        raise Elsewhere(line) from error


def queue_again(stopped: Stopped) -> None:
    """Of a SLURM job that was warned of its end; one that is preempted, or queued again by hand, comes back anyway."""
    ranks, job_id = started(), os.environ.get("SLURM_JOB_ID")
    if job_id and stopped.status - 128 in WARNINGS and (ranks is None or ranks.rank == 0):
        subprocess.run(["scontrol", "requeue", job_id], check=False, timeout=60)


def run_arc(config: Config, member: str = "") -> float:
    """member: the overrides that tell it from the other runs of a command, for its complaints."""
    # Before torch loads OpenMP: its threads spin at every barrier by default, and with the judges of images in a second
    # process on two cores a step then takes ten times as long. 10,000 turns cost nothing when the cores are free.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
    folder, ranks = Path(config.run_dir), started()
    mine = ranks is None or ranks.rank == 0  # the others come when it has begun
    if config.dry_run and not mine:
        return math.nan
    with claimed(folder, "train there") if mine and not config.dry_run else nullcontext():
        from symbiotic.arc import run
        from symbiotic.team import joined

        try:
            team = joined(None if config.dry_run else ranks, str(config.trainer.get("accelerator", "cpu")))
            with team, together(member):
                return float(run(config))
        finally:
            if config.dry_run:
                _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Hydra makes the folder of every run; a dry run leaves none behind."""
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:
            return


def full(error: OSError) -> str:
    """Which file, and how much its disk has."""
    if error.filename is None:
        return str(error)
    folder = next((path for path in Path(error.filename).absolute().parents if path.is_dir()), Path("/"))
    have, told = f"have {shutil.disk_usage(folder).free / 2**20:.1f} MB", error.strerror or ""
    return f"{error.filename} ({told if 'have' in told else have})"


def status_of(error: BaseException) -> int:
    """Exit status: 2 for a wrong config, 3 for a run that its alarm stopped (also in a forked rank), else 1."""
    if type(error).__name__ == "Elsewhere" and error.__cause__ is not None:
        return status_of(error.__cause__)
    if isinstance(error, ConfigError):
        return WRONG_CONFIG
    stopped = re.search(r"^(?:[\w.]+\.)?CollapseStop: ", str(error), re.MULTILINE)
    return CollapseStop.status if isinstance(error, CollapseStop) or stopped else FAILED


def one_line(error: BaseException) -> str | None:
    """The line for a failure that one line explains, empty where another process has printed it; None for a bug, which
    deserves its traceback."""
    if type(error).__name__ == "Elsewhere":
        return ""
    if isinstance(error, RuntimeError) and re.search(r"onnection (closed|reset) by (remote )?peer", str(error)):
        return ENDED
    if isinstance(error, (ConfigError, RunError)) or type(error).__name__ in _EXPECTED:
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {full(error)}; free some space or choose another folder"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {error.filename or error}; choose another folder (paths.runs, .data, .cache)"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}…: a name that no file can have: too long"
    if type(error).__name__ in ("ProcessRaisedException", "RemoteTraceback"):  # raised in a forked rank
        found = re.findall(rf"^(?:[\w.]+\.)?(?:{'|'.join(_EXPECTED)}): (.+)$", str(error), re.MULTILINE)
        return found[-1] if found else None
    return None


# --------------------------------------------------------------------------- the members of a multirun


def members(master: DictConfig) -> list[list[str]]:
    """The overrides of every member, as Hydra's sweeper will make them.

    Of other sweepers (optuna) the members are not known beforehand: each discrete choice is tried once.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = [f"{k}={v}" for k, v in (OmegaConf.to_container(master.hydra.sweeper).get("params") or {}).items()]  # type: ignore[union-attr]
    overrides = OverridesParser.create().parse_overrides([*params, *master.hydra.overrides.task])
    if str(master.hydra.sweeper._target_).endswith(".BasicSweeper"):
        return BasicSweeper.split_arguments(overrides, None)[0]
    lists: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            lists[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            lists[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return _one_at_a_time(list(lists.values()))


def _one_at_a_time(lists: list[list[str]]) -> list[list[str]]:
    first = [options[0] for options in lists]
    others = ([*first[:i], option, *first[i + 1 :]] for i, options in enumerate(lists) for option in options[1:])
    return [first, *others]


def check_members(composer: Composer, master: DictConfig, overrides: Sequence[str]) -> list[Config]:
    """Validate every member before any starts.

    Raises:
        ConfigError: the first member that is wrong, or two that would share a run folder.
    """
    try:
        listed = members(master)
    except Exception as error:
        raise ConfigError(explain(error, overrides, composer.known, CONF)) from error
    configs: dict[str, list[str]] = {}
    found = []
    for i, member in enumerate(listed):
        label = f"member {i + 1} of {len(listed)}: {' '.join(member)}"
        try:
            config = composer.config([*master.hydra.overrides.hydra, *member])
            check_paths(config)
        except ConfigError as error:
            raise ConfigError(f"{error} ({label})") from error
        if config.run_dir in configs:
            twin = " ".join(configs[config.run_dir])
            raise ConfigError(f"{' '.join(member)}: the same run folder as {twin}; leave one of them out")
        configs[config.run_dir] = member
        found.append(config)
    return found


# --------------------------------------------------------------------------- the command line


def launch(args: argparse.Namespace) -> int:
    """Validate, then run. Returns the exit status."""
    from hydra import initialize_config_dir

    conf = Path(args.config_path).absolute() if args.config_path else CONF
    overrides = spelled_out(args.overrides)
    with initialize_config_dir(str(conf), version_base="1.3", job_name="train"):
        try:
            if args.config_dir:
                search_too(Path(args.config_dir))
            composer = Composer(args.config_name or "train")
            start = prepare(composer, overrides, args.multirun)
        except ConfigError as error:
            say(f"error: {error}")
            return WRONG_CONFIG
        return start()


def prepare(composer: Composer, overrides: list[str], multirun: bool) -> Callable[[], int]:
    """Compose and validate everything that will run. Returns what runs it, and gives the exit status.

    Raises:
        ConfigError: one of the runs is wrong.
    """
    master = composer.composed(overrides, multirun=True)
    check_hydra(master.hydra)
    jobs = master.hydra.launcher.get("n_jobs", 1)  # of joblib
    if not isinstance(jobs, int) or jobs == 0:
        raise ConfigError(f"hydra.launcher.n_jobs={jobs}: must be a number of processes, or -1 for all cores")
    ranks = started()
    if ranks is not None and (multirun or isinstance(master.get("study"), DictConfig)):
        many = "-m" if multirun else f"study={master.study.name}"
        raise ConfigError(
            f"{many}: {ranks.by} started {ranks.size} processes, which is for one run; start several by themselves"
        )
    if isinstance(master.get("study"), DictConfig):
        from symbiotic.studies import study_command

        study, cells = study_command.plan(composer, master, overrides)
        return lambda: interruptible(lambda: study_command.run(composer, master, study, cells, job))
    multirun = prepare_runs(composer, master, overrides, multirun)
    return lambda: interruptible(lambda: _run(composer, overrides, multirun))


def check_hydra(node: DictConfig) -> None:
    """What Hydra builds from its own node is a launcher or a sweeper of its plugins, and nothing else.

    Raises:
        ConfigError: something else would be called, or files be written that secrets are not taken out of.
    """
    if node.get("callbacks"):
        raise ConfigError(
            f"hydra.callbacks={list(node.callbacks)}: must be empty; those of a run are the group callbacks"
        )
    for part in ("launcher", "sweeper"):
        target = str(node[part].get("_target_"))
        if not target.startswith(("hydra_plugins.", "hydra._internal.core_plugins.")):
            raise ConfigError(f"hydra.{part}._target_={target}: must be a {part} of Hydra or of one of its plugins")
    for key, right in (("output_subdir", None), ("job.chdir", False)):
        value = OmegaConf.select(node, key)
        if value != right:
            raise ConfigError(f"hydra.{key}={value}: must be {plain(right)}; a run folder has its own config.yaml")
    for key in ("job_logging", "hydra_logging"):
        named = [*_values(OmegaConf.to_container(node[key], resolve=False), ("class", "()"))]
        wrong = [name for name in named if name != "logging.StreamHandler"]
        if wrong:
            raise ConfigError(f"hydra.{key}: {wrong[0]}: must print, and do nothing else")


def _values(node: Any, names: Sequence[str]) -> Iterator[Any]:
    """What stands below these names, wherever they are."""
    if isinstance(node, dict):
        for name, child in node.items():
            if name in names:
                yield child
            yield from _values(child, names)


@contextmanager
def redacted_sweeps() -> Iterator[None]:
    """Inside, the `multirun.yaml` that a sweeper of Hydra writes is without secrets."""
    from hydra._internal.core_plugins import basic_sweeper

    class Redacting(OmegaConf):
        @staticmethod
        def save(config: Any, f: Any, resolve: bool = False) -> None:
            OmegaConf.save(OmegaConf.create(redacted(OmegaConf.to_container(config, resolve=resolve))), f)

    basic_sweeper.OmegaConf = Redacting  # type: ignore[misc]
    try:
        yield
    finally:
        basic_sweeper.OmegaConf = OmegaConf  # type: ignore[misc]


def say(line: str) -> None:
    """On stderr; what every process of a run would say, the first one says."""
    ranks = started()
    if ranks is None or ranks.rank == 0:
        print(line, file=sys.stderr, flush=True)


def interruptible(act: Callable[[], int]) -> int:
    try:
        with handled(at_once):
            return act()
    except KeyboardInterrupt as error:
        say(f"{error or 'interrupted'}; the same command goes on from the newest checkpoint")
        return error.status if isinstance(error, Stopped) else INTERRUPTED


def prepare_runs(composer: Composer, master: DictConfig, overrides: list[str], multirun: bool) -> bool:
    """Validate the runs that are no study's; returns whether they are several (`-m`, or the config's mode)."""
    if multirun or str(master.hydra.mode).endswith("MULTIRUN"):
        launcher = master.hydra.launcher
        nodes = int(launcher.get("nodes") or 1)
        with planned(nodes * int(launcher.get("tasks_per_node") or 1), nodes):
            check_members(composer, master, overrides)
        return True
    check_paths(composer.config(overrides))
    return False


def _run(composer: Composer, overrides: list[str], multirun: bool) -> int:
    hydra = composer.hydra
    assert hydra is not None
    start = hydra.multirun if multirun else hydra.run
    mode = "MULTIRUN" if multirun else "RUN"
    _FAILURES.clear()
    with redacted_sweeps():
        returned = start(composer.config_name, job, [*overrides, f"hydra.mode={mode}"])
    return max((failure.status for failure in (*_FAILURES, *_failures(returned))), default=0)


def _failures(returned: Any) -> Iterable[Failure]:
    """Failures among the jobs that a launcher ran, maybe in other processes."""
    batches = returned if isinstance(returned, list) else [[returned]]
    values = (getattr(ret, "return_value", None) for ret in itertools.chain.from_iterable(batches))
    return [value for value in values if isinstance(value, Failure)]


def main() -> None:
    """The command line of `src/train.py`; ends the process."""
    sys.excepthook = lambda *raised: print(redacted_text("".join(traceback.format_exception(*raised))), file=sys.stderr)
    from hydra._internal.utils import get_args_parser

    args, unknown = get_args_parser().parse_known_args()
    if unknown:
        print(f"error: {unknown[0]}: no such flag; see --hydra-help", file=sys.stderr)
        sys.exit(WRONG_CONFIG)
    if args.experimental_rerun:
        print("error: --experimental-rerun: not supported, as it unpickles a file", file=sys.stderr)
        sys.exit(WRONG_CONFIG)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        sys.exit(show(args))
    sys.exit(launch(args))


def show(args: argparse.Namespace) -> int:
    """Hydra's own `--help`, `--cfg`, `--info`, …, after a compose whose errors are one line."""
    import hydra

    if args.multirun and args.cfg:
        print("error: --cfg: shows one config; leave -m away", file=sys.stderr)
        return WRONG_CONFIG
    if not args.hydra_help and not args.shell_completion:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
            try:
                Composer(args.config_name or "train").composed(args.overrides)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
                return WRONG_CONFIG
    hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")(job)()
    return 0
