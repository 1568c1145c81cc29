"""Whatever is computed from energies or forces has the error bars of the same computation for each member."""

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.vibrations import VibrationsData

from ase_uq import Predictor, fit, propagation
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.results import StoredResults, annotated
from ase_uq.testing.methods import ELEMENTS, labelled_frames


def with_energies(frames: list[Atoms], energies: np.ndarray, members: np.ndarray) -> list[Atoms]:
    return [
        annotated(a, {"energy": e, "energy_uncertainty": m.std(), "energy_ensemble": m})
        for a, e, m in zip(frames, energies, members, strict=True)
    ]


def some(n: int) -> list[Atoms]:
    return [Atoms("H", [(k, 0, 0)]) for k in range(n)]


def test_a_linear_function_is_a_difference():
    rng = np.random.default_rng(1)
    frames = with_energies(some(3), rng.normal(size=3), rng.normal(size=(3, 50)))
    weights = np.array([1.0, -2.0, 0.5])
    found = propagation.propagate(frames, lambda energies: weights @ energies)
    expected = propagation.difference(*zip(weights, frames, strict=True))
    assert found.value == pytest.approx(expected.value)
    assert found.std == pytest.approx(expected.std)
    np.testing.assert_allclose(found.members, expected.members)


def test_arrays_keep_their_shape():
    rng = np.random.default_rng(1)
    frames = with_energies(some(4), rng.normal(size=4), rng.normal(size=(4, 7)))
    found = propagation.propagate(frames, lambda energies: np.outer(energies, [1, 2]))
    assert (found.value.shape, found.std.shape, found.members.shape) == ((4, 2), (4, 2), (7, 4, 2))
    np.testing.assert_allclose(found.std[:, 1], 2 * found.std[:, 0])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    with pytest.warns(UQWarning, match="tells nothing"):
        model = fit(
            calculator := ToyCalculator(ELEMENTS),
            labelled_frames(30, seed=1),
            labelled_frames(30, seed=2),
            methods=["bll"],
            progress=False,
        )
    return Predictor(calculator, model, ensemble=8, ensemble_forces=8)


STEP = 0.01


@pytest.fixture(scope="module")
def displaced(predictor: Predictor) -> list[Atoms]:
    """A water molecule with each coordinate displaced to both sides."""
    frames = []
    for atom, axis, sign in np.ndindex(3, 3, 2):
        frames.append(molecule("H2O"))
        frames[-1].positions[atom, axis] += STEP * (1 - 2 * sign)
    return [annotated(a, p.results) for a, p in zip(frames, predictor.predict(frames), strict=True)]


def dynamical(forces: list[np.ndarray]) -> np.ndarray:
    """Its eigenvalues are squares of frequencies."""
    roots = np.sqrt(np.repeat(molecule("H2O").get_masses(), 3))
    rows = [(minus - plus).ravel() / (2 * STEP) for plus, minus in zip(forces[::2], forces[1::2], strict=True)]
    matrix = np.array(rows) / np.outer(roots, roots)
    return (matrix + matrix.T) / 2


def squares(forces: list[np.ndarray]) -> np.ndarray:
    return np.linalg.eigvalsh(dynamical(forces))


def forces_of(frames: list[Atoms], member: int | None = None) -> list[np.ndarray]:
    results = [atoms.calc.results for atoms in frames if atoms.calc is not None]
    return [r["forces"] if member is None else r["forces_ensemble"][:, :, member] for r in results]


def test_frequencies_from_forces_of_members(displaced: list[Atoms]):
    """Each member has a Hessian of its own."""
    found = propagation.propagate(displaced, squares, of="forces")
    assert found.members.shape == (8, 9)
    np.testing.assert_allclose(found.value, squares(forces_of(displaced)))
    assert (found.std[-3:] > 0).all(), "vibrations are uncertain"
    np.testing.assert_allclose(found.members, [squares(forces_of(displaced, m)) for m in range(8)])


def test_frequencies_are_those_of_ases_vibrations(displaced: list[Atoms]):
    """Which are as well a function of the forces of members."""

    def by_ase(forces: list[np.ndarray]) -> np.ndarray:
        roots = np.sqrt(np.repeat(molecule("H2O").get_masses(), 3))
        return VibrationsData.from_2d(molecule("H2O"), dynamical(forces) * np.outer(roots, roots)).get_energies().real

    found = propagation.propagate(displaced, by_ase, of="forces")
    unit = units._hbar * units.m / np.sqrt(units._e * units._amu)  # eV
    plain = propagation.propagate(displaced, lambda forces: unit * np.sqrt(squares(forces)[-3:]), of="forces")
    np.testing.assert_allclose(found.members[:, -3:], plain.members, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.std[-3:], plain.std, rtol=1e-6)


def test_frequencies_of_members_that_differ_little_are_the_linearised_ones(displaced: list[Atoms]):
    """ω_m² = ω² + eᵀ(D_m - D)e with the modes e of the potential, in first order of the members' deviations."""
    small = [atoms.copy() for atoms in displaced]
    for atoms, original in zip(small, displaced, strict=True):
        results = dict(original.calc.results)
        mean = results["forces"][:, :, None]
        results["forces_ensemble"] = mean + 1e-4 * (results["forces_ensemble"] - mean)
        atoms.calc = StoredResults(atoms, results)
    found = propagation.propagate(small, squares, of="forces")
    matrix = dynamical(forces_of(small))
    modes = np.linalg.eigh(matrix)[1][:, -3:]
    changes = [modes.T @ (dynamical(forces_of(small, m)) - matrix) @ modes for m in range(8)]
    linear = np.array([np.diag(change) for change in changes])
    np.testing.assert_allclose(
        found.members[:, -3:] - found.value[-3:], linear, rtol=1e-3, atol=1e-3 * found.std[-3:].max()
    )
    np.testing.assert_allclose(found.std[-3:], np.sqrt(np.square(linear).mean(0)), rtol=1e-3)


@pytest.fixture
def crystals() -> list[Atoms]:
    return [bulk("Cu", a=3.6 * (1 + x)) for x in np.linspace(-0.03, 0.03, 7)]


def test_an_equation_of_state_has_the_spread_of_its_members(crystals: list[Atoms]):
    """Members are the same curve, stretched and stiffer: volumes and moduli are known."""
    energies = np.array([EMT().get_potential_energy(atoms) for atoms in crystals])
    factors = np.array([0.9, 1.0, 1.1, 1.2])
    found = propagation.equation_of_state(with_energies(crystals, energies, np.outer(energies, factors)))
    assert found.volume == pytest.approx(11.57, abs=0.05)
    assert found.bulk_modulus / units.GPa == pytest.approx(134, abs=5)
    assert found.volume_std == pytest.approx(0, abs=1e-4)
    spread = np.sqrt(np.square(factors - 1).mean())
    assert found.bulk_modulus_std == pytest.approx(spread * found.bulk_modulus, rel=1e-3)
    assert found.energy_std == pytest.approx(spread * abs(found.energy), rel=1e-3)
    assert found.members.shape == (4, 3)


def test_without_a_minimum_there_is_none(crystals: list[Atoms]):
    energies = np.array([EMT().get_potential_energy(atoms) for atoms in crystals])
    slope = np.linspace(0, 3, 7)[:, None] * np.array([0, 1, -1, 0.5])
    with pytest.raises(InputError, match="have no minimum among these volumes, or the members differ too much"):
        propagation.equation_of_state(with_energies(crystals, energies, energies[:, None] + slope))


def test_bad_input(crystals: list[Atoms]):
    frames: Any = with_energies(some(2), np.zeros(2), np.ones((2, 4)))
    with pytest.raises(ValueError, match="of is 'energy', 'forces' or 'stress', not 'virial'"):
        propagation.propagate(frames, np.sum, of="virial")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no frames to compute anything from"):
        propagation.propagate([], np.sum)
    with pytest.raises(ValueError, match="gave nan for member 0: finite real numbers"):
        propagation.propagate(frames, lambda energies: float("nan") if energies.any() else 0.0)
    with pytest.raises(InputError, match=r"frame 0 has no forces_ensemble of its own\. .* ensemble_forces=16"):
        propagation.propagate(frames, np.sum, of="forces")
    with pytest.raises(InputError, match=r"frame 0 has no stress_ensemble of its own\. .* Only crystals have one"):
        propagation.propagate(frames, np.sum, of="stress")
    with pytest.raises(InputError, match="frame 0 has no cell"):
        propagation.equation_of_state(frames)
    with pytest.raises(ValueError, match="5 different volumes or more, and 4 were given"):
        propagation.equation_of_state(crystals[:4])
    unequal = [
        annotated(a, {"energy": 0.0, "forces": np.zeros((1, 3)), "forces_ensemble": np.zeros((1, 3, n))})
        for n, a in zip((4, 5), some(2), strict=True)
    ]
    with pytest.raises(InputError, match="frame 1 has 5 members, frame 0 has 4"):
        propagation.propagate(unequal, lambda forces: forces[0].sum(), of="forces")


def test_a_function_that_changes_what_it_gets_changes_no_frame():
    forces, members = np.ones((2, 3)), np.ones((2, 3, 4))
    atoms = annotated(
        Atoms("H2", [(0, 0, 0), (0, 0, 1)]), {"energy": 0.0, "forces": forces, "forces_ensemble": members}
    )

    def spoiling(forces: list[np.ndarray]) -> float:
        forces[0] -= forces[0].mean(0) + 1
        return float(forces[0].sum())

    propagation.propagate([atoms], spoiling, of="forces")
    assert atoms.calc is not None
    np.testing.assert_array_equal(atoms.calc.results["forces"], 1)
    np.testing.assert_array_equal(atoms.calc.results["forces_ensemble"], 1)


@pytest.mark.parametrize("given", [1j, "text", [[1.0], [1.0, 2.0]]])
def test_what_is_no_real_number_is_refused(given: Any):
    frames = with_energies(some(2), np.zeros(2), np.ones((2, 4)))
    with pytest.raises(ValueError, match="for the potential: finite real numbers were expected"):
        propagation.propagate(frames, lambda _: given)


def test_equations_of_state_of_nothing_that_has_one(crystals: list[Atoms]):
    volumes = np.array([atoms.cell.volume for atoms in crystals])
    hill = -0.01 * (volumes - volumes.mean()) ** 2
    with pytest.raises(InputError, match="have no minimum among these volumes"):
        propagation.equation_of_state(with_energies(crystals, hill, np.outer(hill, np.ones(4))))
    bowl = with_energies(crystals, -hill, np.outer(-hill, np.ones(4)))
    for eos in ("bla", None):
        with pytest.raises(ValueError, match=r"ase\.eos has no form .*birchmurnaghan"):
            propagation.equation_of_state(bowl, eos)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="of one crystal, and these are Cu, Cu8"):
        propagation.equation_of_state([*bowl[:6], annotated(crystals[6].repeat(2), {"energy": 0.0})])


def test_members_that_are_no_numbers_or_of_another_shape_are_refused():
    """An average of them would be NaN, and NaN is not below the fewest frames that must count."""
    broken = with_energies(some(20), np.zeros(20), np.ones((20, 4)))
    broken[7] = annotated(broken[7], {"energy": 0.0, "energy_ensemble": np.array([0, 1, np.nan, 0])})
    attempts = (
        lambda: propagation.average(broken, np.ones(20), 300),
        lambda: propagation.difference(*((1.0, atoms) for atoms in broken)),
        lambda: propagation.propagate(broken, np.sum),
    )
    for attempt in attempts:
        with pytest.raises(
            InputError, match=r"members of frame 7 are not finite: the potential gave no .* Leave it out"
        ):
            attempt()
    for key, results in (
        ("forces", {"forces": np.zeros((1, 3)), "forces_ensemble": np.zeros((1, 4))}),
        ("stress", {"stress": np.zeros(6), "stress_ensemble": np.zeros(8)}),
    ):
        frames = [annotated(some(1)[0], {"energy": 0.0, **results})]
        with pytest.raises(InputError, match=rf"frame 0 has a {key}_ensemble of shape .*'members'\) was expected"):
            propagation.propagate(frames, lambda x: np.sum(x[0]), of=key)  # pyright: ignore[reportArgumentType]
