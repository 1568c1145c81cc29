"""A potential with corrections keeps the contract: the mean is that of ASE's sum, the corrections are exact."""

from typing import Any

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import AverageCalculator, LinearCombinationCalculator, SumCalculator

from ase_uq import Predictor, UncertainCalculator, fit
from ase_uq.backends import load_backend
from ase_uq.backends.mace.backend import MACECalculator
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import PotentialMismatch
from ase_uq.testing.backends import BackendContract, PassLaws, standard_frames
from ase_uq.testing.methods import ELEMENTS, labelled_frames

from .builders import make_mace, water


class Dispersion(Calculator):
    """-c/r⁶ between all atoms of a structure, as a D3 calculator would add it; its stress a 3×3 matrix."""

    def __init__(
        self, strength: float = 2.0, implemented: tuple[str, ...] = ("energy", "free_energy", "forces", "stress")
    ):
        super().__init__()
        self.strength = strength
        self.implemented_properties = list(implemented)

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        vectors = self.atoms.positions[None] - self.atoms.positions[:, None]
        squares = (vectors**2).sum(-1) + 1.0
        pairs = -self.strength / squares**3
        forces = (6 * self.strength / squares**4)[:, :, None] * vectors
        energy = pairs.sum() / 2 - pairs.trace() / 2
        # Not its derivative: what a sum makes of a stress does not depend on where it is from.
        stress = 1e-3 * np.arange(9.0).reshape(3, 3)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces.sum(1), "stress": stress + stress.T}


class OfASum(PassLaws):
    # Sums of the parts are rounded once more than the parts.
    mean_tolerance = 1e-10

    def last_layer(self, calculator):
        return [calculator.mixer.calcs[0].potential.weights]

    # The stand-in for D3 makes its stress up.
    test_stress_is_the_derivative_by_strain = None


class SumContract(OfASum, BackendContract):
    pass


class TestToyAndDispersion(SumContract):
    def make_calculator(self, dtype="float64"):
        return SumCalculator([ToyCalculator(dtype=dtype), Dispersion()])


class TestWeights(SumContract):
    def make_calculator(self, dtype="float64"):
        toy, one, two = ToyCalculator(dtype=dtype), Dispersion(), Dispersion(1.0)
        return LinearCombinationCalculator([toy, one, two], [0.7, 1.0, -0.5])


class TestDirectAndDispersion(OfASum):
    conservative = False
    is_equivariant = False

    def make_calculator(self, dtype="float64"):
        return SumCalculator([ToyCalculator(direct=True, dtype=dtype), Dispersion()])

    def last_layer(self, calculator):
        potential = calculator.mixer.calcs[0].potential
        return [potential.weights, potential.force_weights]


class TestMACEAndDispersion(OfASum):
    """What `mace_mp(dispersion=True)` returns, in the order it does."""

    def make_calculator(self, dtype="float64"):
        mace = MACECalculator(models=make_mace(correlation=1), device="cpu", default_dtype=dtype)
        return SumCalculator([mace, Dispersion()])

    def last_layer(self, calculator):
        (mace, _) = calculator.mixer.calcs
        first, last = mace.models[0].readouts
        return [next(first.linear.parameters()), next(last.linear_2.parameters())]


class TestCommitteeAndDispersion(OfASum):
    n_forwards = 2

    def make_calculator(self, dtype="float64"):
        models = [make_mace(layers=1, correlation=1, seed=seed) for seed in range(2)]
        committee = MACECalculator(models=models, device="cpu", default_dtype=dtype)
        return LinearCombinationCalculator([committee, Dispersion()], [0.7, 1.0])

    # The energy is the committee's, the last layer the first member's.
    test_last_layers_are_linear_in_the_trained_weights = None


def test_results_are_those_that_all_have():
    backend = load_backend(SumCalculator([ToyCalculator(), Dispersion()]))
    assert backend.results == ("energy", "free_energy", "forces", "stress")
    backend = load_backend(SumCalculator([ToyCalculator(), LennardJones(sigma=2.0, epsilon=0.01)]))
    assert backend.results == ("energy", "free_energy", "energies", "forces", "stress")
    assert load_backend(SumCalculator([ToyCalculator(), Dispersion(implemented=("energy",))])).results == ("energy",)


class WithoutStress(Dispersion):
    """As D3 programs are: a stress where there is a cell, and ASE's error where there is none."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        if self.atoms.cell.rank < 3:
            del self.results["stress"]

    def get_property(self, name, atoms=None, allow_calculation=True):
        if name == "stress" and (atoms or self.atoms).cell.rank < 3:
            raise PropertyNotImplementedError("stress")
        return super().get_property(name, atoms, allow_calculation)


class TestACorrectionWithoutStressInVacuum:
    """What the bare sum gives for a structure, and nothing more, whatever it is evaluated with."""

    def calculator(self) -> SumCalculator:
        return SumCalculator([ToyCalculator(ELEMENTS), WithoutStress()])

    def frames(self) -> list:
        return [atoms for pair in zip(labelled_frames(2), labelled_frames(2, cell=4.5), strict=True) for atoms in pair]

    @pytest.mark.filterwarnings("ignore::ase_uq.errors.UQWarning")
    @pytest.mark.parametrize("cell", [None, 4.5])
    @pytest.mark.parametrize("methods", [["bll"], ["bll", "pdrum", "kernel"]])
    def test_the_others_are_there(self, methods: list[str], cell: float | None):
        train, held_out = (labelled_frames(20, seed=seed, cell=cell) for seed in (1, 2))
        model = fit(self.calculator(), train, held_out, methods=methods, progress=False)
        predictor = Predictor(load_backend(self.calculator()), model)
        together = predictor.predict(self.frames())
        for atoms, prediction in zip(self.frames(), together, strict=True):
            (alone,) = predictor.predict([atoms])
            bare = self.calculator()
            assert ("stress" in prediction.results) == ("stress" in alone.results) == (atoms.cell.rank == 3)
            assert {key for key in prediction.results if "stress" in key} <= (
                {*predictor.results} if atoms.cell else set()
            )
            np.testing.assert_allclose(prediction["forces"], bare.get_property("forces", atoms), atol=1e-10)
            for key, value in prediction.results.items():
                assert np.isfinite(value).all(), key
                np.testing.assert_allclose(value, alone[key], rtol=1e-6, atol=1e-9, err_msg=key)
        atoms = labelled_frames(1)[0].copy()
        atoms.calc = UncertainCalculator(self.calculator(), model)
        assert np.isfinite(atoms.get_forces()).all()
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()

    def test_other_results_must_be_there(self):
        class WithoutForces(WithoutStress):
            def get_property(self, name, atoms=None, allow_calculation=True):
                if name == "forces":
                    raise PropertyNotImplementedError("forces")
                return super().get_property(name, atoms, allow_calculation)

        backend = load_backend(SumCalculator([ToyCalculator(), WithoutForces()]))
        with pytest.raises(PropertyNotImplementedError, match="forces"):
            backend.forward(backend.collate([water()]))


def test_energies_of_atoms_are_added_up():
    total = SumCalculator([ToyCalculator(), LennardJones(sigma=2.0, epsilon=0.01, rc=4.0)])
    silicon = bulk("Si").repeat(2)
    silicon.rattle(0.05, seed=0)
    backend = load_backend(total)
    e = backend.forward(backend.collate([silicon]))
    assert e.energies is not None
    np.testing.assert_allclose(e.energies, total.get_property("energies", silicon), atol=1e-12)
    np.testing.assert_allclose(e.stress[0], total.get_property("stress", silicon), atol=1e-12)


def test_corrections_need_not_know_the_elements_of_the_potential():
    """EMT would refuse the probe structure, which has every element of the potential."""
    elements = ("H", "C", "Cu", "Si")
    total = SumCalculator([ToyCalculator(elements=elements), EMT()])
    backend, copper = load_backend(total), bulk("Cu").repeat(2)
    copper.rattle(0.05, seed=0)
    assert backend.identity.fingerprint != load_backend(ToyCalculator(elements=elements)).identity.fingerprint
    found = backend.forward(backend.collate([copper]))
    np.testing.assert_allclose(found.forces, total.get_property("forces", copper), atol=1e-12)


def test_corrections_are_part_of_the_identity():
    with_dispersion = load_backend(SumCalculator([ToyCalculator(), Dispersion()]))
    with_pairs = load_backend(SumCalculator([ToyCalculator(), LennardJones()]))
    with pytest.raises(PotentialMismatch, match=r"added was .*LennardJones.*, here it is .*Dispersion"):
        with_dispersion.check_identity(with_pairs.identity)
    halved = LinearCombinationCalculator([ToyCalculator(), Dispersion()], [0.5, 1.0])
    bare = load_backend(ToyCalculator())
    # A correction that is added to the whole potential counts as exact, and so is not missed; nothing else is.
    warning = with_dispersion.check_identity(bare.identity)
    assert warning is not None
    assert "fitted without corrections that this potential has (added: [[1.0, 'Dispersion', {}]]; weight" in warning
    with pytest.raises(PotentialMismatch, match=r"added was None, here it is .*Dispersion"):
        load_backend(halved).check_identity(bare.identity)
    with pytest.raises(PotentialMismatch, match=r"added was .*Dispersion.*, here it is None"):
        bare.check_identity(with_dispersion.identity)
    with pytest.raises(PotentialMismatch, match=r"weight_in_sum was 0\.5, here it is 1\.0"):
        with_dispersion.check_identity(load_backend(halved).identity)


def test_parameters_of_corrections_are_part_of_the_identity():
    weak, strong = (load_backend(SumCalculator([ToyCalculator(), LennardJones(epsilon=e)])) for e in (1, 100))
    with pytest.raises(PotentialMismatch, match=r"added was .*'epsilon': 100.*, here it is .*'epsilon': 1\.0,"):
        weak.check_identity(strong.identity)
    same = load_backend(SumCalculator([ToyCalculator(), LennardJones(epsilon=100.0)]))
    assert same.check_identity(strong.identity) is None


def test_parameters_that_json_cannot_hold_are_left_out():
    pairs = LennardJones()
    pairs.parameters["table"] = np.zeros(3)
    backend = load_backend(SumCalculator([ToyCalculator(), pairs]))
    assert "table" not in str(backend.identity.settings)
    assert (
        backend.identity.fingerprint
        == load_backend(SumCalculator([ToyCalculator(), LennardJones()])).identity.fingerprint
    )


def test_no_forces_are_asked_of_corrections_where_none_are_wanted():
    class EnergyOnly(Dispersion):
        def get_property(self, name, atoms=None, allow_calculation=True):
            assert name == "energy"
            return super().get_property(name, atoms, allow_calculation)

    backend = load_backend(SumCalculator([ToyCalculator(), EnergyOnly()]))
    assert backend.forward(backend.collate(standard_frames()), forces=False).forces is None


def test_sums_in_sums():
    inner: Any = SumCalculator([ToyCalculator(), Dispersion(1.0)])
    total = SumCalculator([Dispersion(0.5), inner])
    backend = load_backend(total)
    e = backend.forward(backend.collate([water()]))
    np.testing.assert_allclose(e.forces, total.get_property("forces", water()), atol=1e-12)


def test_without_a_potential():
    with pytest.raises(TypeError, match=r"none of the calculators in this SumCalculator has a backend: Emt|EMT, Lenn"):
        load_backend(SumCalculator([EMT(), LennardJones()]))


def test_with_two_potentials():
    with pytest.raises(TypeError, match=r"2 of the calculators in this AverageCalculator \(ToyCalculator, ToyCalcul"):
        load_backend(AverageCalculator([ToyCalculator(), ToyCalculator(seed=1)]))


def test_without_an_energy_in_common():
    with pytest.raises(TypeError, match=r"\(ToyCalculator, Dispersion\) have no energy in common"):
        load_backend(SumCalculator([ToyCalculator(), Dispersion(implemented=("forces",))]))


def test_calculators_of_the_user_keep_their_structures():
    """The corrections are evaluated on copies."""
    dispersion = Dispersion()
    backend = load_backend(SumCalculator([ToyCalculator(), dispersion]))
    atoms = molecule("CO2")
    atoms.calc = dispersion
    before = atoms.get_potential_energy()
    backend.forward(backend.collate([water()]))
    assert atoms.get_potential_energy() == before
