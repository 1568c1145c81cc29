"""What it costs to have LAMMPS move the atoms: steps of LAMMPS beside those of ASE's VelocityVerlet, as a ratio.

    python benchmarks/lammps_coupling.py [--blocks 15] [--steps 20] [--out NAME]

Both sides take turns, a block of steps each, because machines are noisy: the ratio is the median over pairs of
neighbouring blocks of CPU time, its spread the quartiles. A potential that answers at once, with made-up numbers, shows
the coupling alone; the embedded MACE with its uncertainties, on 72 atoms, what is left of it in practice. Writes
NAME.md.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.io import read
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm

from ase_uq import UncertainCalculator, embedded
from ase_uq.engines.lammps import LammpsDynamics, open_lammps

STEP = 0.2  # fs


class AtOnce(Calculator):
    """Answers with the same numbers for every structure."""

    implemented_properties = [  # noqa: RUF012
        "energy",
        "forces",
        "stress",
        "energies_uncertainty",
        "forces_uncertainty",
        "energy_uncertainty",
        "gamma",
    ]

    def __init__(self, atoms: Atoms) -> None:
        super().__init__()
        n, random = len(atoms), np.random.default_rng(0)
        forces = 0.01 * random.normal(size=(n, 3))
        self._answer = {
            "energy": -1.0,
            "forces": forces - forces.mean(0),
            "stress": np.zeros(6),
            "energy_uncertainty": 0.1,
            "energies_uncertainty": np.full(n, 0.01),
            "forces_uncertainty": np.full((n, 3), 0.01),
            "gamma": np.full(n, 0.5),
        }

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = dict(self._answer)


def silicon(repeat: int) -> Atoms:
    atoms = bulk("Si", cubic=True).repeat(repeat)
    atoms.rattle(0.01, seed=0)
    return atoms


def molecules() -> Atoms:
    """Eight molecules in a periodic box."""
    atoms = read(embedded.path("malonaldehyde.xyz"))
    assert isinstance(atoms, Atoms)
    atoms = Atoms(atoms.numbers, atoms.positions, cell=[8.0, 7.0, 6.0], pbc=True)
    atoms.center()
    atoms = atoms.repeat(2)
    atoms.rattle(0.01, seed=0)
    return atoms


def in_lammps(lammps: Any, atoms: Atoms, calculator: Calculator) -> LammpsDynamics:
    elements = sorted(set(atoms.symbols))
    x, y, z = atoms.cell.lengths()
    lammps.commands_list(
        ["clear", "units metal", f"region box block 0 {x} 0 {y} 0 {z}", f"create_box {len(elements)} box"]
    )
    types = [elements.index(symbol) + 1 for symbol in atoms.symbols]
    lammps.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, atoms.positions.ravel().tolist())
    for number, symbol in enumerate(elements, 1):
        lammps.command(f"mass {number} {Atoms(symbol).get_masses()[0]}")
    lammps.commands_list(["pair_style zero 3.0 nocoeff", "pair_coeff * *", "fix move all nve", "thermo 100000"])
    lammps.command(f"timestep {STEP / 1000}")
    dynamics = LammpsDynamics(lammps, calculator, elements)
    dynamics.run(2)
    return dynamics


def in_ase(atoms: Atoms, calculator: Calculator) -> VelocityVerlet:
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, STEP * units.fs)
    dynamics.run(2)
    return dynamics


def milliseconds(run: Callable[[int], Any], steps: int) -> float:
    start = time.process_time()
    run(steps)
    return 1000 * (time.process_time() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15, help="blocks of steps of each side")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lammps_coupling"))
    arguments = parser.parse_args()
    cases = {f"at once, {8 * n**3} atoms": (silicon(n), AtOnce) for n in (2, 5, 10)}
    uq = embedded.path("mace.uq.safetensors")
    cases["embedded MACE, 72 atoms"] = molecules(), lambda _: UncertainCalculator("embedded:mace", uq)
    lines = [
        "# LAMMPS as the engine\n\n"
        f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; "
        f"`{' '.join(['python', *sys.argv])}`\n",
        "| potential | step of ASE (ms of CPU time) | step of LAMMPS (ms) | LAMMPS / ASE | quartiles |",
        "|---|---:|---:|---:|---|",
    ]
    with open_lammps("-log", "none", "-screen", "none") as lammps:
        for name, (atoms, potential) in tqdm(cases.items(), unit="case"):
            theirs, ours = in_ase(atoms, potential(atoms)), in_lammps(lammps, atoms, potential(atoms))
            times = []
            for block in range(arguments.blocks):
                sides = [theirs.run, ours.run]
                order = (0, 1) if block % 2 else (1, 0)
                row = {side: milliseconds(sides[side], arguments.steps) for side in order}
                times.append([row[0], row[1]])
            of_ase, of_lammps = np.median(times, axis=0)
            low, middle, high = np.quantile([row[1] / row[0] for row in times], [0.25, 0.5, 0.75])
            lines.append(f"| {name} | {of_ase:.3f} | {of_lammps:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
