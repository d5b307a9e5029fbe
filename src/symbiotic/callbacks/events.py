"""The run record: what happened to a run beside its metrics, one JSON object a line in `events.jsonl`.

Phases that ended early, alarms and what they did, self-checks that failed. An event has a step, a kind and a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from symbiotic.files import naming, read_objects, write_text
from symbiotic.redact import redacted_text, redacted_texts

EVENTS = "events.jsonl"

Event = dict[str, Any]


def record_event(trainer: Trainer, step: int, kind: str, text: str, **data: Any) -> None:
    """Add an event to the record of the run (rank 0) and print its text. `step` counts finished optimiser steps.

    kind: `phase`, `alarm`, `hidden`, `intervention` or `self_check`. data: plain values.
    """
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / EVENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(redacted_texts({"step": step, "kind": kind, "text": text, **data})) + "\n")
    print(f"step {step}: {redacted_text(text)}", flush=True)


def read_events(folder: Path | str) -> list[Event]:
    """The events of a run folder, oldest first; a line that a kill cut off, or that was damaged, is left out."""
    return read_objects(Path(folder) / EVENTS, "step", "kind", "text")


def rewind_events(folder: Path | str, step: int) -> None:
    """Forget what happened after `step`, before a run goes on from there; makes an empty record where there is none."""
    path = Path(folder) / EVENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [event for event in read_events(folder) if event["step"] <= step]
    write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
