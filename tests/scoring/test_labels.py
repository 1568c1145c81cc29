"""Labels of scored frames: they go on under names of their own, and only where they are labels of this potential."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ase_uq import Predictor, UncertainCalculator, evaluate, fit, score
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.errors import UQWarning
from ase_uq.report.survey import survey
from ase_uq.testing.methods import labelled_frames

REF = ("REF_energy", "REF_forces", "REF_stress")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # made-up labels make the fit complain
        train, held_out = (labelled_frames(20, seed=seed, cell=4.5) for seed in (1, 2))
        return Predictor(load_backend("toy:"), fit("toy:", train, held_out, methods=["bll"], progress=False))


@pytest.fixture
def frames() -> list[Atoms]:
    return labelled_frames(8, seed=3, cell=4.5)


def scored(predictor: Predictor, frames: list[Atoms] | Path, tmp_path: Path) -> list[Atoms]:
    score(frames, predictor, out=tmp_path / "out.xyz", overwrite=True, progress=False)
    return read(tmp_path / "out.xyz", ":")


def labels(atoms: Atoms) -> set[str]:
    return {key for key in REF if key in atoms.info or key in atoms.arrays}


def in_calculator(atoms: Atoms) -> Atoms:
    """The frame with its labels where ASE's readers put them."""
    energy, stress = atoms.info.pop(REF[0]), atoms.info.pop(REF[2])
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=atoms.arrays.pop(REF[1]), stress=stress)
    return atoms


def in_info(atoms: Atoms) -> Atoms:
    atoms.info |= {"energy": atoms.info.pop(REF[0]), "stress": atoms.info.pop(REF[2])}
    atoms.arrays["forces"] = atoms.arrays.pop(REF[1])
    return atoms


def half_renamed(atoms: Atoms) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=atoms.info.pop(REF[0]))
    return atoms


class TestUnderASEsNames:
    @pytest.mark.parametrize("place", [in_calculator, in_info, half_renamed])
    @pytest.mark.parametrize("file", ["", "in.xyz", "in.traj"])
    def test_labels_arrive_wherever_they_were(
        self, predictor: Predictor, frames: list[Atoms], place: Callable[[Atoms], Atoms], file: str, tmp_path: Path
    ):
        if file == "in.traj" and place is not in_calculator:
            pytest.skip("trajectories of ASE hold no arrays of other names")
        placed = [place(atoms.copy()) for atoms in frames]
        if file:
            write(tmp_path / file, placed)
        found = scored(predictor, tmp_path / file if file else placed, tmp_path)
        for atoms, original in zip(found, frames, strict=True):
            assert atoms.info[REF[0]] == pytest.approx(original.info[REF[0]], abs=1e-6)
            np.testing.assert_allclose(atoms.arrays[REF[1]], original.arrays[REF[1]], atol=1e-6)
        assert {"forces", "energy_per_atom"} == set(survey(found).samples)
        assert labels(placed[0]) == ({REF[1], REF[2]} if place is half_renamed else set()), "the input is not changed"

    @pytest.mark.parametrize("noise", [0.0, 1e-5])
    def test_results_of_the_potential_are_no_labels(
        self, predictor: Predictor, frames: list[Atoms], noise: float, tmp_path: Path
    ):
        """As in a trajectory that it made, perhaps in another precision."""
        for atoms in frames:
            atoms.info, calculator = {}, ToyCalculator()
            del atoms.arrays[REF[1]]
            forces = calculator.get_property("forces", atoms)
            forces = forces * (1 + noise * np.random.default_rng(0).normal(size=forces.shape))
            atoms.calc = SinglePointCalculator(atoms, energy=calculator.get_property("energy", atoms), forces=forces)
        assert {frozenset(labels(atoms)) for atoms in scored(predictor, frames, tmp_path)} == {frozenset()}

    def test_without_forces_the_energy_tells(self, predictor: Predictor, tmp_path: Path):
        """A lone atom has no forces, of whichever potential."""
        atoms = Atoms("O", [(0.1, 0.2, 0.3)])
        own = ToyCalculator().get_property("energy", atoms)
        for energy, expected in ((own, set()), (own + 0.1, {"REF_energy", "REF_forces"})):
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
            assert labels(scored(predictor, [atoms], tmp_path)[0]) == expected

    def test_results_with_uncertainties_are_no_labels(self, predictor: Predictor, frames: list[Atoms], tmp_path: Path):
        first = scored(predictor, [in_calculator(frames[0])], tmp_path)
        assert labels(first[0]) == {*REF}
        other = ToyBackend(ToyCalculator(seed=5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UQWarning)
            fitted = fit(
                other, *(labelled_frames(20, seed=s, cell=4.5) for s in (1, 2)), methods=["bll"], progress=False
            )
        for key in (REF[0], REF[2]):
            del first[0].info[key]
        del first[0].arrays[REF[1]]
        assert labels(scored(Predictor(other, fitted), first, tmp_path)[0]) == set()

    def test_results_of_another_structure_are_no_labels(
        self, predictor: Predictor, frames: list[Atoms], tmp_path: Path
    ):
        in_calculator(frames[0]).positions += 0.1 * np.eye(3)[0] * np.arange(len(frames[0]))[:, None]
        assert labels(scored(predictor, frames[:1], tmp_path)[0]) == set()

    def test_a_live_calculator_of_the_potential(self, predictor: Predictor, frames: list[Atoms], tmp_path: Path):
        atoms = Atoms(frames[0].numbers, frames[0].positions, cell=frames[0].cell, pbc=True)
        atoms.calc = UncertainCalculator(ToyCalculator(), predictor.uncertainty_model)
        atoms.get_forces()
        assert labels(scored(predictor, [atoms], tmp_path)[0]) == set()


class TestOtherHeads:
    @pytest.fixture
    def headed(self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Predictor:
        monkeypatch.setattr(ToyBackend, "heads", ("dft", "pt"))
        monkeypatch.setattr(ToyBackend, "head", "dft")
        return predictor

    @pytest.mark.parametrize("place", [lambda atoms: atoms, half_renamed])
    def test_labels_of_another_head_are_not_compared(
        self, headed: Predictor, frames: list[Atoms], place: Callable[[Atoms], Atoms], tmp_path: Path
    ):
        for number, head in enumerate(["dft", "pt", "unknown", "pt"]):
            frames[number].info["head"] = head
        with pytest.warns(UQWarning, match="frame 1 is labelled for head 'pt' of the potential, .* 'dft' here") as told:
            found = scored(headed, [place(atoms) for atoms in frames], tmp_path)
        assert len([one for one in told if one.category is UQWarning]) == 1, (
            "the second frame of this head is not named"
        )
        assert [REF[1] in atoms.arrays for atoms in found] == [True, False, True, False, True, True, True, True]
        assert len(found) == len(frames), "the structures themselves are scored"

    def test_frames_without_labels_may_name_any_head(self, headed: Predictor, frames: list[Atoms], tmp_path: Path):
        atoms = Atoms(frames[0].numbers, frames[0].positions, info={"head": "pt"})
        assert len(scored(headed, [atoms], tmp_path)) == 1

    def test_evaluate_refuses_them_by_number(self, headed: Predictor, frames: list[Atoms]):
        frames[0].info, frames[4].info["head"], frames[5].info["head"] = {"head": "pt"}, "pt", "dft"
        del frames[0].arrays[REF[1]]
        with pytest.raises(ValueError, match=r"test frame 4 is labelled for head 'pt' of .*; so are 1 of 7"):
            evaluate(headed, frames, progress=False)
