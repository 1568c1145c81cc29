"""What scoring costs beside the potential, and how much memory it takes, as trajectories become longer.

    python benchmarks/scoring_scale.py [--frames 10000 100000 1000000] [--shards N | --journal] [--out NAME]

Water of the toy potential, which takes less time than anything around it: what is measured is reading, batching,
results, text and the journal. Each number of frames is a process of its own, which reports its processor time and, from
the operating system, its largest memory. With --shards the trajectory is scored in shards as well, which are merged.

    score       processor time, all threads, ms a frame of the trajectory; without starting Python
    last tenth  that of the last tenth of the frames over that of the second one: 1 if the cost is flat
    MiB         largest resident memory; of shards, that of the largest
    file        size of scored.xyz, MB
    shards      as `score`, of all of them together: each reads through the whole trajectory
    same bytes  whether the merged file is that of the run without shards

With --journal only the journal is measured, which gets the same hundred results again and again under other numbers:

    journal     processor time, ms a frame, of putting frames and rows on the disk
    resume      processor time, s, of taking up all of it, as after a kill
"""

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from overhead import machine

from ase_uq import UncertaintyModel, fit, score
from ase_uq.backends.toy import ToyCalculator
from ase_uq.scoring.frame_file import frame_file
from ase_uq.scoring.frame_score import rows_in
from ase_uq.scoring.journal import Journal
from ase_uq.scoring.shards import merge_shards

LABELLED = 60


def frames_of(count: int, seed: int) -> Iterator[Atoms]:
    rng, start = np.random.default_rng(seed), molecule("H2O")
    for _ in range(count):
        atoms = start.copy()
        atoms.positions += 0.05 * rng.normal(size=(len(atoms), 3))
        yield atoms


def fitted(path: Path) -> None:
    """An uncertainty model of invented labels."""
    rng, calculator = np.random.default_rng(0), ToyCalculator()
    sets = []
    for seed in (1, 2):
        frames = list(frames_of(LABELLED, seed))
        for atoms in frames:
            calculator.calculate(atoms)
            atoms.info["REF_energy"] = calculator.results["energy"] + 0.01 * rng.normal()
            atoms.set_array("REF_forces", calculator.results["forces"] + 0.05 * rng.normal(size=(len(atoms), 3)))
        sets.append(frames)
    fit(ToyCalculator(), *sets, methods=["bll"], progress=False).save(path)


def trajectory(path: Path, count: int) -> None:
    """Frames as text, a thousand different ones again and again: making them would take longer than scoring them."""
    texts = [
        '3\nProperties=species:S:1:pos:R:3 pbc="F F F"\n'
        + "".join(f"{a.symbol} {a.x:.8f} {a.y:.8f} {a.z:.8f}\n" for a in atoms)
        for atoms in frames_of(1000, 3)
    ]
    with open(path, "w") as file:
        for first in range(0, count, len(texts)):
            file.write("".join(texts[: count - first]))


@contextmanager
def watched(times: list[tuple[int, float]]) -> Iterator[None]:
    """Notes the processor time after every batch that the journal has written, with the number of its last frame."""
    append: Callable[..., None] = Journal.append

    def noted(self: Journal, rows: Any, frames: Any) -> None:
        append(self, rows, frames)
        if rows:
            times.append((rows[-1].frame, time.process_time()))

    Journal.append = noted
    try:
        yield
    finally:
        Journal.append = append


def last_tenth(times: list[tuple[int, float]]) -> float:
    """Time of the last tenth of the frames over that of the second one."""
    at, spent = np.array(times).T
    tenths = np.interp(np.array([0.1, 0.2, 0.9, 1.0]) * at[-1], at, spent)
    return float((tenths[3] - tenths[2]) / (tenths[1] - tenths[0]))


def largest_memory() -> float:
    """Of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def journal_of(folder: Path, count: int) -> dict[str, float]:
    """Writes results that are there, again and again, and takes all of them up."""
    model = UncertaintyModel.load(folder / "toy.uq.safetensors")
    some = {kind: folder / f"some.{kind}" for kind in ("xyz", "csv")}
    score(list(frames_of(100, 3)), ToyCalculator(), model, out=some["xyz"], csv=some["csv"], progress=False)
    rows, texts = list(rows_in(some["csv"])), [text for _, text in frame_file(some["xyz"]).finished(some["xyz"])]
    times: list[tuple[int, float]] = []
    seconds = 0.0
    with Journal(folder / "out.xyz", None, {}) as journal:
        for first in range(0, count, len(rows)):
            numbered = [replace(row, frame=first + row.frame) for row in rows]
            told = [re.sub(rb"source_frame=\d+", b"source_frame=%d" % (first + i), t) for i, t in enumerate(texts)]
            begin = time.process_time()
            journal.append(numbered, told)
            seconds += time.process_time() - begin
            times.append((first, seconds))
    begin = time.process_time()
    with Journal(folder / "out.xyz", None, {}) as journal:
        assert journal.n_resumed == journal.next_frame == times[-1][0] + len(rows)
        found = {"resume": time.process_time() - begin, "ms": 1e3 * seconds / journal.n_resumed}
        size = (folder / "out.xyz.part").stat().st_size / 1e6
        journal.finish()
    return found | {"last tenth": last_tenth(times), "mib": largest_memory(), "size": size}


def one(folder: Path, what: str, count: int) -> dict[str, float]:
    """Scores in this process, or one shard, or merges shards, or fills a journal."""
    if what == "journal":
        return journal_of(folder, count)
    times: list[tuple[int, float]] = []
    model = UncertaintyModel.load(folder / "toy.uq.safetensors")
    begin = time.process_time()
    if what == "merge":
        merge_shards(sorted(folder.glob("part_*.xyz")), out=folder / "merged.xyz", progress=False)
    else:
        shard, out = (None, "scored.xyz") if what == "score" else (what, f"part_{what.partition('/')[0]}.xyz")
        with watched(times):
            score(folder / "in.xyz", ToyCalculator(), model, out=folder / out, shard=shard, progress=False)
    seconds = time.process_time() - begin
    found = {"ms": 1e3 * seconds / count, "mib": largest_memory()}
    return found | ({"last tenth": last_tenth(times)} if what == "score" else {})


def in_a_process(folder: Path, what: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--what", what, "--frames", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(count: int, n_shards: int, journal: bool) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted(folder / "toy.uq.safetensors")
        if journal:
            alone = in_a_process(folder, "journal", count)
            cells = [f"{alone['ms']:.4f}", f"{alone['last tenth']:.2f}", f"{alone['mib']:.0f}", f"{alone['size']:.0f}"]
            return f"| {count} | {' | '.join(cells)} | {alone['resume']:.2f} |"
        trajectory(folder / "in.xyz", count)
        whole = in_a_process(folder, "score", count)
        size = (folder / "scored.xyz").stat().st_size / 1e6
        cells = [f"{whole['ms']:.3f}", f"{whole['last tenth']:.2f}", f"{whole['mib']:.0f}", f"{size:.0f}"]
        if n_shards:
            parts = [in_a_process(folder, f"{i}/{n_shards}", count) for i in range(1, n_shards + 1)]
            merged = in_a_process(folder, "merge", count)
            same = (folder / "merged.xyz").read_bytes() == (folder / "scored.xyz").read_bytes()
            cells += [
                f"{sum(part['ms'] for part in parts):.3f}",
                f"{max(part['mib'] for part in parts):.0f}",
                f"{merged['ms']:.3f}",
                f"{merged['mib']:.0f}",
                "yes" if same else "NO",
            ]
        return f"| {count} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=0, help="number of shards; 0 for none")
    parser.add_argument("--journal", action="store_true", help="the journal alone")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--what", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.what:
        print(json.dumps(one(arguments.folder, arguments.what, arguments.frames[0])))
        return
    titles = ["frames", "score (ms a frame)", "last tenth", "MiB", "file (MB)"]
    if arguments.journal:
        titles = ["frames", "journal (ms a frame)", "last tenth", "MiB", "file (MB)", "resume (s)"]
    elif arguments.shards:
        titles += ["shards (ms a frame)", "MiB", "merge (ms a frame)", "MiB", "same bytes"]
    head = f"# Scoring as trajectories become longer\n\n{machine('cpu')}; `python {shlex.join(sys.argv)}`\n"
    lines = [head, f"| {' | '.join(titles)} |", "|" + "---:|" * len(titles)]
    for count in arguments.frames:
        lines.append(row(count, arguments.shards, arguments.journal))
        print(lines[-1], flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
