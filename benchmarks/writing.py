"""What writing a scored frame takes, as text and in ASE's binary format, and which results come back from each.

    python benchmarks/writing.py [--rounds 7] [--out NAME]

extxyz is what `score` writes; .traj is ASE's own binary format, with the same frames. In turns, in one process; each
figure is the smallest of the rounds, in ms of processor time a frame. The frames are those of the embedded MACE: its
molecule, and a box of 24 of them. Prints a table; with --out also writes NAME.md.
"""

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from ase import Atoms
from ase.io import read
from ase.io.trajectory import TrajectoryReader, TrajectoryWriter
from overhead import machine
from throughput import box, molecules, potential

from ase_uq.io.extxyz import extxyz_text
from ase_uq.io.results import annotated, with_results
from ase_uq.prediction import Prediction


def as_text(path: Path, frames: Sequence[Atoms], predictions: Sequence[Prediction]) -> None:
    texts = [
        extxyz_text(a, p.results, source_frame=i) for i, (a, p) in enumerate(zip(frames, predictions, strict=True))
    ]
    path.write_text("".join(texts))


def as_trajectory(path: Path, frames: Sequence[Atoms], predictions: Sequence[Prediction]) -> None:
    with TrajectoryWriter(path) as trajectory:
        for number, (atoms, prediction) in enumerate(zip(frames, predictions, strict=True)):
            trajectory.write(annotated(atoms, prediction.results, source_frame=number))


def spent(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    predictor = potential("embedded", "cpu")
    lines = [f"# Writing a scored frame\n\n{machine('cpu')}; `python {shlex.join(sys.argv)}`\n"]
    lines += [
        "| frames | atoms | format | write (ms a frame) | read (ms a frame) | kB a frame | results that come back |"
    ]
    lines += ["|---|---:|---|---:|---:|---:|---|"]
    for title, frames in {"molecule": molecules()[:30], "box of 24 molecules": [box(0), box(1)]}.items():
        predictions = predictor.predict(frames)
        wanted = predictions[0].results.keys()
        with tempfile.TemporaryDirectory() as folder:
            ways = {
                "extxyz": (Path(folder, "a.xyz"), as_text, lambda path: read(path, ":")),
                ".traj": (Path(folder, "a.traj"), as_trajectory, lambda path: list(TrajectoryReader(path))),
            }
            times: dict[tuple[str, str], list[float]] = {
                (name, what): [] for name in ways for what in ("write", "read")
            }
            for _ in range(arguments.rounds):
                for name, (path, write, back) in ways.items():
                    times[name, "write"].append(spent(partial(write, path, frames, predictions)))
                    times[name, "read"].append(spent(partial(back, path)))
            for name, (path, _, back) in ways.items():
                results = with_results(back(path)[0]).calc.results
                lost = [key for key in wanted if key not in results]
                found = f"{len(wanted) - len(lost)} of {len(wanted)}" + (f"; without {', '.join(lost)}" if lost else "")
                write_ms, read_ms = (1e3 * min(times[name, what]) / len(frames) for what in ("write", "read"))
                size = path.stat().st_size / len(frames) / 1e3
                lines.append(
                    f"| {title} | {len(frames[0])} | {name} | {write_ms:.2f} | {read_ms:.2f} | {size:.1f} | {found} |"
                )
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
