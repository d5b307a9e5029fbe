"""One run of a study, in whatever process a launcher starts it: output into a file, a row and a line when it ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from symbiotic.claim import Claimed
from symbiotic.config import PARENT_ONLY
from symbiotic.redact import RedactedFile, redacted_text
from symbiotic.schema import CollapseStop, Config, ConfigError, RunError
from symbiotic.studies import ledger

OUTPUT = "output.txt"
RUNNER = "SYMBIOTIC_STUDY"
"""Environment variable: the process that runs the study."""


class OverBudget(RunError):
    """The study's hours are spent; the run was not begun."""


def run_member(config: Config, run: Callable[[Config], float]) -> float:
    """Run it, unless the budget is spent; then its row, and its line in the ledger, also where it fails.

    Raises: as `run`, and OverBudget.
    """
    end_with_runner()
    folder, study = Path(config.paths.runs) / config.name, config.study
    spent, budget = ledger.hours(ledger.read(folder)), study.get("budget_hours")
    start = time.perf_counter()
    try:
        if budget is not None and spent >= budget:
            raise OverBudget(f"the study's budget is spent: {spent:.2f} of {budget:g} hours")
        with output_to(Path(config.run_dir) / OUTPUT):
            value = told(run, config)
        if not config.parent_only:
            add_row(config, folder)
    except BaseException as error:
        line = redacted_text(" ".join(str(error).split())) or type(error).__name__
        ledger.add(folder, entry(config, status_of(error), start, line))
        raise
    ledger.add(folder, entry(config, "done", start))
    return value


def told(run: Callable[[Config], float], config: Config) -> float:
    """A failure leaves its traceback in the run's output: the study shows its one line."""
    try:
        return run(config)
    except BaseException:
        traceback.print_exc()
        raise


def status_of(error: BaseException) -> ledger.Status:
    if isinstance(error, OverBudget):
        return "over budget"
    if isinstance(error, KeyboardInterrupt):  # neither done nor failed: it goes on when the study does
        return "interrupted"
    if isinstance(error, CollapseStop):
        return "stopped"
    return "refused" if isinstance(error, (ConfigError, Claimed)) else "failed"


def entry(config: Config, status: ledger.Status, start: float, text: str = "") -> ledger.Entry:
    what: ledger.What = "parent" if config.parent_only else "run"
    seconds = round(time.perf_counter() - start, 1)
    name = Path(config.run_dir).name.removesuffix(PARENT_ONLY)  # a parent that fails is told beside its run
    return ledger.Entry(what, name, config.study["member"], config.seed, status, seconds, text)


def add_row(config: Config, folder: Path) -> None:
    from symbiotic.studies import results_file
    from symbiotic.studies.runs_of import read_run

    row = results_file.row_of(read_run(Path(config.run_dir)), config.study["member"], config.study.get("logged", ()))
    results_file.add_rows(folder / results_file.FILE, [row])


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """What the run prints goes to the end of a file, without secrets: runs side by side would mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.closing(RedactedFile(file)) as clean,
        contextlib.redirect_stdout(clean),
        contextlib.redirect_stderr(clean),
    ):
        yield


def end_with_runner() -> None:
    """A worker process whose study was killed ends within a second: its run goes on when the study does."""
    runner = os.environ.get(RUNNER)
    if runner is None or int(runner) != os.getppid() or any(t.name == RUNNER for t in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == int(runner):
            time.sleep(0.5)
        print(f"the study's process {runner} has ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name=RUNNER, daemon=True).start()
