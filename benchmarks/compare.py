"""What potentials see of the same atoms: reconstruction errors on real frames, and what fine-tuning does to features.

    python benchmarks/compare.py [SET ...] [--data ../shared/data] [--models ../shared/models ...] [--frames 60]
                                 [--out benchmarks/results/compare] [--keep]

    malonaldehyde  the embedded MACE and both orb potentials, on embedded frames: 300 K, 900 K, perturbed
    silicon        SevenNet-0, trained on many elements, against a MACE that was trained on 34 frames of silicon
    acac           MACEs of one architecture: one of 200 epochs, and two of 64 epochs and other seeds
    fine-tuning    the embedded MACE before and after training on frames of 900 K, with and without old frames: the
                   drift of its features, its force errors, and what the old uncertainty model is worth if it is left

With --keep, sections of other sets in OUT.md stay. Writes OUT.md, and pictures beside it.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from ase import Atoms
from ase.io import read
from matplotlib import pyplot as plt
from quality import frames_of, spec_of
from scipy.spatial.transform import Rotation

from ase_uq import embedded, fit, load_backend, metrics
from ase_uq.backends.base import Backend
from ase_uq.diagnostics.comparison import Comparison, compare
from ase_uq.diagnostics.drift import Drift, drift
from ase_uq.diagnostics.features import Latent
from ase_uq.diagnostics.reconstruction import gfre
from ase_uq.report.comparison_plots import latent_maps, reconstruction
from ase_uq.uncertainty_model.model import UncertaintyModel

# Learning rate, epochs, and number of old frames beside the new ones.
TRAININGS = ((1e-4, 1, 0), (1e-3, 1, 0), (1e-3, 4, 0), (1e-2, 4, 0), (1e-2, 4, 120))
N_NEW = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=60, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compare"))
    parser.add_argument("--keep", action="store_true", help="sections of other sets stay")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sets if name not in SETS]:
        parser.error(f"there is no set {unknown[0]!r}. There are: {', '.join(SETS)}.")
    mpl.use("Agg")
    file = arguments.out.with_suffix(".md")
    sections = sections_in(file) if arguments.keep else {}
    for name in arguments.sets or SETS:
        try:
            sections[name] = SETS[name](arguments)
        except FileNotFoundError as error:
            sections[name] = f"Left out: {error}\n"
            print(f"{name} is left out: {error}", file=sys.stderr)
        text = [f"## {each}\n\n{sections[each].strip()}\n" for each in SETS if each in sections]
        title = (
            f"# What potentials see of the same atoms\n\n`python benchmarks/compare.py --frames {arguments.frames}`\n"
        )
        file.write_text("\n".join([title, *text]))  # what an interrupted run has found stays
    print(file.read_text())


def sections_in(file: Path) -> dict[str, str]:
    """What is below each heading."""
    if not file.exists():
        return {}
    parts = file.read_text().split("\n## ")[1:]
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def malonaldehyde(arguments: argparse.Namespace) -> str:
    names = ("calibration_300K", "test_300K", "test_900K", "perturbed")
    splits = {name: some(read(embedded.path(f"{name}.xyz"), ":"), arguments.frames * 3) for name in names}
    potentials = {name: load_backend(f"embedded:{name}") for name in ("mace", "orb-direct", "orb-conservative")}
    frames = [atoms for each in splits.values() for atoms in each]
    found = compare(potentials, frames)
    save(reconstruction(matrices(found), found.names), arguments.out.with_suffix(".png"))
    symbols = [frames[f][p].symbol for f, p in zip(found.pointwise.frame, found.pointwise.place, strict=True)]
    ax = latent_maps(
        {name: plane.coordinates["atoms"] for name, plane in found.planes.items()},
        {name: found.seen_by_no_other(name)[found.sampled] for name in found.names},
        [symbols[i] for i in found.sampled],
        explained={name: plane.explained for name, plane in found.planes.items()},
        label="what the best of the others misses",
    )
    save(ax, arguments.out.with_name(f"{arguments.out.name}_maps.png"))
    return f"{exactness(potentials, frames)}\n\n{told(found)}\n\n{by_split(found, splits)}"


def exactness(potentials: Mapping[str, Backend], frames: Sequence[Atoms]) -> str:
    """GFRE of each potential with itself, and from it to a random linear image of its features."""
    rows = []
    for name, backend in potentials.items():
        image = Latent(backend, random_image)
        own, to_image = gfre(backend, backend, frames)[0], gfre(backend, image, frames)[0]
        rows.append(f"| {name} | {own:.1e} | {to_image:.1e} | {turned(backend, frames[::4]):.2g} |")
    heads = "| potential | GFRE to itself | GFRE to a linear image of itself | moves when frames are turned |"
    note = "The last column: root mean square change of the features, as a share of their spread within elements."
    return "\n".join([heads, "|---|---:|---:|---:|", *rows, "", note])


def turned(backend: Backend, frames: Sequence[Atoms]) -> float:
    """How far features move when frames are turned at random, as a share of their spread within elements."""
    copies = [atoms.copy() for atoms in frames]
    for number, atoms in enumerate(copies):
        atoms.positions = atoms.positions @ Rotation.random(random_state=number).as_matrix().T
    one, other = (backend.forward(backend.collate(each), forces=False) for each in (frames, copies))
    spread = sum(((rows := one.features[one.numbers == z]) - rows.mean(0)).square().sum() for z in one.numbers.unique())
    return float(((other.features - one.features).square().sum() / spread).sqrt())


def random_image(forward_pass) -> torch.Tensor:
    """100 random mixtures of the features, moved and scaled."""
    width = forward_pass.features.shape[1]
    mixture = torch.randn(width, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 1e3 * forward_pass.features.double() @ mixture + 5


def silicon(arguments: argparse.Namespace) -> str:
    splits = {name: some(each, arguments.frames) for name, each in frames_of("si_mlearn", arguments.data).items()}
    frames = [atoms for each in splits.values() for atoms in each]
    specs = {"SevenNet-0": "sevennet:7net-0", "MACE of silicon": spec_of("mace_si.model", arguments.models)}
    found = compare({name: load_backend(spec) for name, spec in specs.items()}, frames)
    return f"{told(found)}\n\n{by_split(found, splits)}"


def acac(arguments: argparse.Namespace) -> str:
    splits = {name: some(each, arguments.frames) for name, each in frames_of("acac", arguments.data).items()}
    frames = [atoms for each in splits.values() for atoms in each]
    files = {"200 epochs": "", "64 epochs, seed 2": "_committee_2", "64 epochs, seed 3": "_committee_3"}
    specs = {name: spec_of(f"mace_acac{end}.model", arguments.models) for name, end in files.items()}
    found = compare({name: load_backend(spec) for name, spec in specs.items()}, frames)
    return f"{told(found)}\n\n{by_split(found, splits)}"


def fine_tuning(arguments: argparse.Namespace) -> str:
    from mace.calculators import MACECalculator

    hot: list[Atoms] = read(embedded.path("test_900K.xyz"), ":")  # pyright: ignore[reportAssignmentType]
    cold: list[Atoms] = read(embedded.path("train_300K.xyz"), ":")  # pyright: ignore[reportAssignmentType]
    fitted_on = cold[::3], read(embedded.path("calibration_300K.xyz"), "::2")
    held_out = {"300 K": read(embedded.path("test_300K.xyz"), "::3"), "900 K": hot[-120:]}
    old = load_backend("embedded:mace")
    left = fit(old, *fitted_on, methods=["bll"], progress=False)
    rows = [row("as it was", None, worth(old, left, held_out), None)]
    for rate, epochs, n_old in TRAININGS:
        name = f"rate {rate:g}, {epochs} epoch{'s' * (epochs > 1)}{f', and {n_old} old frames' if n_old else ''}"
        model = copy.deepcopy(old.calculator.models[0])
        fine_tune(model, hot[:N_NEW] + (some(cold, n_old) if n_old else []), rate, epochs)
        new = load_backend(MACECalculator(models=[model], device="cpu", default_dtype="float64"))
        again = fit(new, *fitted_on, methods=["bll"], progress=False)
        moved = drift(old, new, embedded.path("calibration_300K.xyz"))
        rows.append(row(name, moved, worth(new, left, held_out), worth(new, again, held_out)))
        print(rows[-1], file=sys.stderr)
    return "\n".join(
        [
            f"The embedded MACE, trained further on {N_NEW} frames of 900 K. Drift on 320 calibration frames of 300 K, "
            "in brackets as a share of the spread within elements. Root mean square error of force components in "
            "meV/Å, and mean z² and Spearman's correlation with the force error of a Bayesian last layer, on frames "
            "that nothing was trained on, of 300 and 900 K: the one of the old potential as it is (left), and one that "
            "was fitted and calibrated again on the same frames of 300 K (again).",
            "",
            "| potential | moved | gained | lost | error | z², left | again | Spearman, left | again |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
        ]
    )


def row(name: str, moved: Drift | None, left: list[list[float]], again: list[list[float]] | None) -> str:
    pairs = [] if moved is None else [(moved.moved, moved.moved_within), (moved.gained, moved.gained_within)]
    pairs += [] if moved is None else [(moved.lost, moved.lost_within)]
    cells = [f"{a:.3f} ({b:.2f})" for a, b in pairs] or ["", "", ""]
    cells.append(", ".join(f"{at[0]:.0f}" for at in left))
    for which in (1, 2):
        cells += ["" if each is None else ", ".join(f"{at[which]:.2f}" for at in each) for each in (left, again)]
    return f"| {name} | {' | '.join(cells)} |"


def worth(backend: Backend, model: UncertaintyModel, frames: Mapping[str, Sequence[Atoms]]) -> list[list[float]]:
    """RMSE (meV/Å), mean z² and Spearman's correlation on each set, with an uncertainty model that may be another's."""
    found = []
    for each in frames.values():
        forward_pass = backend.forward(backend.collate(each))
        assert forward_pass.forces is not None
        std = model.apply(forward_pass)["forces_uncertainty"].cpu().numpy()
        errors = np.concatenate([atoms.arrays["REF_forces"] for atoms in each]) - forward_pass.forces.cpu().numpy()
        norms = (np.linalg.norm(values, axis=1) for values in (errors, std))
        found.append([1e3 * np.sqrt(np.mean(errors**2)), np.mean((errors / std) ** 2), metrics.spearman(*norms)])
    return found


def fine_tune(model: torch.nn.Module, frames: Sequence[Atoms], rate: float, epochs: int) -> None:
    """Trains a MACE further in place, as examples/06_active_learning.py does."""
    from mace.data import AtomicData, KeySpecification, config_from_atoms
    from mace.tools import AtomicNumberTable
    from mace.tools.torch_geometric import DataLoader
    from mace.tools.torch_tools import default_dtype

    keys = KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    with default_dtype(torch.float64):
        configs = [config_from_atoms(atoms, keys) for atoms in frames]
        data = [AtomicData.from_config(config, z_table=table, cutoff=float(model.r_max)) for config in configs]
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    for _ in range(epochs):
        for batch in loader:
            predicted = model(batch.to_dict(), training=True)
            energy_error = (predicted["energy"] - batch.energy) / (batch.ptr[1:] - batch.ptr[:-1])
            loss = (predicted["forces"] - batch.forces).square().mean() + 10 * energy_error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            schedule.step()
    model.requires_grad_(False)


def some(frames: Sequence[Atoms], most: int) -> list[Atoms]:
    """At most this many frames, evenly spread."""
    return list(frames[:: max(1, -(-len(frames) // most))])


def matrices(found: Comparison) -> dict[str, np.ndarray]:
    def square(values: Callable[[tuple[str, str]], float]) -> np.ndarray:
        return np.array([[values((a, b)) if a != b else np.nan for b in found.names] for a in found.names])

    return {
        "one linear map (GFRE)": square(lambda pair: found.gfre[pair]),
        "GFRE / spread within elements": square(found.beyond_elements),
        f"maps on {found.n_neighbours} neighbours (LFRE)": square(lambda pair: found.lfre[pair].value),
    }


def told(found: Comparison) -> str:
    """Features, all errors of all pairs, and drifts, as tables."""
    features = ", ".join(f"{name} {n}" for name, n in found.n_features.items())
    lines = [
        f"{found.n_frames} frames, {len(found.pointwise.numbers):,} atoms; features: {features}. LFRE on "
        f"{found.n_neighbours} neighbours, {len(found.sampled):,} atoms, with 95 % intervals.",
        "",
        f"| from | to | GFRE | of the spread within elements | {' | '.join(found.elements)} | LFRE | GFRD |",
        f"|---|---|---:|---:|{'---:|' * len(found.elements)}---:|---:|",
    ]
    for pair in found.pairs:
        value, low, high = found.lfre[pair]
        shares = [f"{found.beyond_elements(pair, symbol):.2f}" for symbol in (None, *found.elements)]
        cells = [
            f"{found.gfre[pair]:.3f}",
            *shares,
            f"{value:.3f} ({low:.3f} to {high:.3f})",
            f"{found.gfrd[pair]:.3f}",
        ]
        lines.append(f"| {' | '.join([*pair, *cells])} |")
    drifts = [f"- {old} to {new}: {moved.describe()}" for (old, new), moved in found.drifts.items()]
    return "\n".join([*lines, *(["", *drifts] if drifts else [])])


def by_split(found: Comparison, splits: Mapping[str, Sequence[Atoms]]) -> str:
    """The root mean square error of the atoms of each split."""
    split_of_frame = np.repeat(np.arange(len(splits)), [len(each) for each in splits.values()])
    split = split_of_frame[found.pointwise.frame]
    lines = [
        "Root mean square error of the atoms of each split, by the same linear maps:",
        "",
        f"| from | to | {' | '.join(splits)} |",
        f"|---|---|{'---:|' * len(splits)}",
    ]
    for pair in found.pairs:
        squares = found.pointwise.errors[pair].astype(float) ** 2
        cells = [f"{np.sqrt(squares[split == number].mean()):.3f}" for number in range(len(splits))]
        lines.append(f"| {' | '.join([*pair, *cells])} |")
    return "\n".join(lines)


def save(ax: plt.Axes, path: Path) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=110)
    plt.close(figure)


SETS: dict[str, Callable[[argparse.Namespace], str]] = {
    "malonaldehyde": malonaldehyde,
    "silicon": silicon,
    "acac": acac,
    "fine-tuning": fine_tuning,
}

if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the potentials' packages
        main()
