"""What writing a scored frame takes, in each format that could hold it, and which results come back from each.

    python benchmarks/writing.py [--rounds 3] [--frames 2000] [--out NAME]

extxyz and HDF5 are what `score` writes, made here as it makes them: the bytes of each frame, of HDF5 the records and
then the file. Beside them are ASE's own binary format .traj, and, where their packages are installed, .aselmdb, the
database of ase-db-backends, and the writer of znh5md, whose layout of HDF5 ours is. In turns, in one process; each
figure is the smallest of the rounds, in ms of processor time a frame. The frames are those of the embedded MACE: its
molecule, and a box of 24 of them. "Mixed" has both, nine molecules for each box, since HDF5 fills up frames that are
smaller than others; thirty frames show what a file takes by itself. The results that come back are those of
`ase.io.read`, which needs znh5md for HDF5, and of `read_frames`. Prints a table; with --out also writes NAME.md.
"""

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase.db
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.io.trajectory import TrajectoryWriter
from overhead import machine
from throughput import box, molecules, potential

from ase_uq.io.frames import read_frames
from ase_uq.io.results import annotated
from ase_uq.scoring.frame_file import frame_file

Results = Mapping[str, Any]


def as_score_does(path: Path, frames: Sequence[Atoms], results: Sequence[Results]) -> None:
    file = frame_file(path)
    with open(path, "wb") as growing:
        for number, (atoms, result) in enumerate(zip(frames, results, strict=True)):
            growing.write(file.encode(number, atoms, result, {})[0])
    file.finish(path)


def as_trajectory(path: Path, frames: Sequence[Atoms], results: Sequence[Results]) -> None:
    with TrajectoryWriter(path) as trajectory:
        for number, (atoms, result) in enumerate(zip(frames, results, strict=True)):
            trajectory.write(annotated(atoms, result, source_frame=number))


def as_database(path: Path, frames: Sequence[Atoms], results: Sequence[Results]) -> None:
    path.unlink(missing_ok=True)
    with ase.db.connect(path) as database:
        for number, (atoms, result) in enumerate(zip(frames, results, strict=True)):
            database.write(annotated(atoms, result, source_frame=number), data=dict(result))


def as_znh5md(path: Path, frames: Sequence[Atoms], results: Sequence[Results]) -> None:
    from znh5md import IO

    copies = []
    for number, (atoms, result) in enumerate(zip(frames, results, strict=True)):
        copies.append(atoms.copy())
        copies[-1].info["source_frame"] = number
        copies[-1].calc = SinglePointCalculator(copies[-1])
        copies[-1].calc.results.update(result)
    path.unlink(missing_ok=True)
    IO(path, tqdm_limit=len(copies) + 1).extend(copies)


def by_ase(path: Path) -> list[Atoms]:
    return read(path, ":")


WAYS: dict[str, tuple[str, Callable[..., None], Callable[[Path], list[Atoms]], str]] = {
    "extxyz": ("a.xyz", as_score_does, read_frames, ""),
    "HDF5": ("a.h5", as_score_does, read_frames, ""),
    ".traj": ("a.traj", as_trajectory, by_ase, ""),
    ".aselmdb": ("a.aselmdb", as_database, by_ase, "ase_db_backends"),
    "HDF5 by znh5md": ("b.h5", as_znh5md, by_ase, "znh5md"),
}


def spent(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def kinds(n_frames: int) -> dict[str, list[Atoms]]:
    """Frames of a molecule, of boxes and of both; every one has positions of its own."""
    small = molecules()
    many = [small[i % len(small)].copy() for i in range(n_frames)]
    large = [box(seed) for seed in range(max(n_frames // 10, 2))]
    mixed = [frame for i, one in enumerate(large) for frame in (one, *many[9 * i : 9 * i + 9])]
    return {"molecule": many, "molecule, 30 frames": many[:30], "box of 24 molecules": large, "mixed": mixed}


def found(path: Path, back: Callable[[Path], list[Atoms]], wanted: Sequence[str]) -> str:
    """How many results a reader has, and which it has not."""
    calc = back(path)[0].calc
    lost = [key for key in wanted if calc is None or key not in calc.results]
    return f"{len(wanted) - len(lost)} of {len(wanted)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    predictor = potential("embedded", "cpu")
    lines = [f"# Writing a scored frame\n\n{machine('cpu')}; `python {shlex.join(sys.argv)}`\n"]
    lines += [
        "| frames | atoms | format | write (ms a frame) | of extxyz | read (ms a frame) | kB a frame | of extxyz | "
        "results by `ase.io.read` | by `read_frames` |"
    ]
    lines += ["|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    ways = {name: way for name, way in WAYS.items() if not way[3] or find_spec(way[3])}
    for title, frames in kinds(arguments.frames).items():
        results = [prediction.results for atoms in frames for prediction in predictor.predict([atoms])]
        atoms = sum(map(len, frames)) / len(frames)
        with tempfile.TemporaryDirectory() as folder:
            times: dict[tuple[str, str], list[float]] = {}
            for _ in range(arguments.rounds):
                for name, (file, write, back, _) in ways.items():
                    path = Path(folder, file)
                    times.setdefault((name, "write"), []).append(spent(partial(write, path, frames, results)))
                    times.setdefault((name, "read"), []).append(spent(partial(back, path)))
            least = {key: 1e3 * min(values) / len(frames) for key, values in times.items()}
            size = {name: Path(folder, way[0]).stat().st_size / len(frames) / 1e3 for name, way in ways.items()}
            for name, (file, *_) in ways.items():
                is_hdf5, path, wanted = file.endswith(".h5"), Path(folder, file), list(results[0])
                ase = found(path, by_ase, wanted) if not is_hdf5 or find_spec("znh5md") else "–"
                ours = found(path, read_frames, wanted)
                lines.append(
                    f"| {title} | {atoms:.0f} | {name} | {least[name, 'write']:.3f} | "
                    f"{least[name, 'write'] / least['extxyz', 'write']:.2f} | {least[name, 'read']:.3f} | "
                    f"{size[name]:.1f} | {size[name] / size['extxyz']:.2f} | {ase} | {ours} |"
                )
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
