"""(g) What the data loader reads: `python benchmarks/loader.py [--quick]`.

Samples of the embedded corpus with images (32 x 32), shuffled, the disk's cache warm: one read of the index with and
without decoding, webdataset from first to last with and without decoding, the members of the tar from the disk and from
a server on loopback (blocks fetched first, then cached), and whole micro-batches, packed, with samples read anew or
kept in memory. Samples a second; micro-batches count their samples.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Contender, chosen, parser, race, ratio, report, spread

from symbiotic.arc import Arc
from symbiotic.config import compose
from symbiotic.data.loader import MicroBatches
from symbiotic.data.remote import Fetching, RemoteSource
from symbiotic.data.shards import ShardReader
from symbiotic.data.tar import LocalSource, Source, read_body, read_members

sys.path.append(str(ROOT / "tests"))  # its server


def members(source: Source, at_most: int) -> None:
    for number, member in enumerate(read_members(source)):
        read_body(source, member)
        if number + 1 == 2 * at_most:
            break


def sequential(path: Path, at_most: int, decode: bool) -> None:
    import webdataset

    found = webdataset.WebDataset(str(path), shardshuffle=False)
    for number, _ in enumerate(found.decode("rgb8") if decode else found):
        if number + 1 == at_most:
            break


def contenders(
    config: Any, dataset: MicroBatches, address: str, count: int, cache: Path
) -> list[tuple[int, Contender]]:
    """Each with the number of samples that one act reads."""
    folder = dataset.reader.folder  # type: ignore[attr-defined]
    index, shard = dataset.plan.index, next(iter(sorted(folder.glob("mmu-*.tar"))))
    reader = ShardReader(folder, index)
    order = np.random.default_rng(0).permutation(len(index))[:count]
    chosen_pictures = [int(i) for i in np.random.default_rng(0).choice(index.members_of("mmu"), count)]
    anew = MicroBatches(folder.parent, dataset.plan, cache_bytes=0, reader=reader)
    batches = range(max(1, count // config.data.samples))
    samples = config.data.samples * len(batches)
    blocks = Fetching(str(cache))

    def remote(fresh: bool) -> None:
        if fresh:
            shutil.rmtree(cache, ignore_errors=True)
        with RemoteSource(shard.name, f"{address}/{shard.name}", blocks) as source:
            members(source, count)

    acts: dict[str, tuple[int, Callable[[], object]]] = {
        "index, not decoded": (count, lambda: [reader.record(int(i)) for i in order]),
        "index, decoded": (count, lambda: [reader.read(i) for i in chosen_pictures]),
        "webdataset, not decoded": (count, lambda: sequential(shard, count, False)),
        "webdataset, decoded": (count, lambda: sequential(shard, count, True)),
        "members of a tar, disk": (count, lambda: members(LocalSource(shard), count)),
        "members of a tar, server": (count, lambda: remote(True)),
        "members of a tar, server, cached": (count, lambda: remote(False)),
        "micro-batches, read anew": (samples, lambda: [anew[i] for i in batches]),
        "micro-batches, in memory": (samples, lambda: [dataset[i] for i in batches]),
    }
    return [(number, Contender(name, act)) for name, (number, act) in acts.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, ("tiny",))
    made.add_argument("--count", type=int, default=400, help="samples an act")
    made.add_argument("--experiment", default="symbiotic")
    asked = chosen(made, arguments)
    from served import serving

    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arc = Arc(compose([f"experiment={asked.experiment}", f"paths.runs={base}"]))
        arc.prepare_data()
        if arc.scorers is not None:
            arc.scorers.wait()
        dataset: Any = arc.dataset(arc.config, True)
        server = stack.enter_context(serving(dataset.reader.folder))
        found = contenders(arc.config, dataset, server.address, asked.count, base / "cache")
        race([c for _, c in found], asked.rounds, asked.clock)
    last = next(c for _, c in found if c.name == "webdataset, not decoded")
    rows = [
        {
            "what": c.name,
            "samples/s": f"{number / c.median:,.0f}",
            f"time / {last.name}": spread(ratio(c, last)) if number == asked.count else "",
        }
        for number, c in found
    ]
    report("loader: samples a second", {"reading": rows}, asked.out, {c.name: c.seconds for _, c in found})


if __name__ == "__main__":
    main()
