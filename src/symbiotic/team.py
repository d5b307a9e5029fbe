"""What the processes of one run that torchrun or srun started do together outside its fits.

Everything but training is done by the first one, and what it makes lies in files: the others wait, and find it there.
A single process is a team of one, and waits for nobody. Ranks that a fit forks have none of this.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from symbiotic.ranks import Ranks
from symbiotic.schema import RunError

PATIENCE = datetime.timedelta(days=2)  # that others have with the first one while it evaluates

T = TypeVar("T")
_group: Any = None  # over the CPU, with patience; None: this process is alone
_store: Any = None  # where they leave word without waiting; it stays while its process lives: others may be late


class Elsewhere(RunError):
    """A process failed, and why has been said, here or there; here: `__cause__` is what it raised."""


@contextmanager
def joined(ranks: Ranks | None, accelerator: str) -> Iterator[None]:
    """Inside, the processes of a run know each other, and only the first one prints."""
    global _group, _store
    if ranks is None:
        yield
        return
    if ranks.by == "srun":
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        cluster = SLURMEnvironment(auto_requeue=False)
        os.environ.update(MASTER_ADDR=cluster.main_address, MASTER_PORT=str(cluster.main_port))
        os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.size))
    backend = "nccl" if accelerator != "cpu" and torch.cuda.is_available() else "gloo"
    store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.size))
    _store = dist.PrefixStore("said", store)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=ranks.rank, world_size=ranks.size)
    _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        with redirect_stdout(sys.stdout if ranks.rank == 0 else io.StringIO()):
            yield
    finally:
        _group = None
        dist.destroy_process_group()


def is_first() -> bool:
    return _group is None or dist.get_rank() == 0


def size() -> int:
    return 1 if _group is None else dist.get_world_size()


def unsaid(line: str, alone: bool = False) -> bool:
    """Whether no process has asked this of the line before; alone: of any line, for one that others explain.

    None waits for another, which may be stuck where it needs this one. Who cannot ask any more may say it.
    """
    try:
        first_of_all = _store.add("lines", 1) == 1
        return first_of_all if alone else _store.add(hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


def agree(make: Callable[[], T]) -> T:
    """What the first process makes, in every one; plain values.

    Raises:
        Elsewhere: it failed.
    """
    if _group is None:
        return make()
    said: list[Any] = [False, None]
    try:
        if is_first():
            said = [True, make()]
    finally:
        dist.broadcast_object_list(said, src=0, group=_group)
    if not said[0]:
        raise Elsewhere("the first process failed")
    return said[1]


@contextmanager
def first() -> Iterator[None]:
    """The first process does it, then the others; who finds that it is done already does nothing.

    Raises:
        Elsewhere: the first one failed.
    """
    if not is_first():
        agree(lambda: None)
    done = False
    try:
        yield
        done = True
    finally:
        if is_first() and _group is not None:
            dist.broadcast_object_list([done, None], src=0, group=_group)
