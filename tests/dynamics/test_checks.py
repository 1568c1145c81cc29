"""Checks of a frame beside its uncertainty: tables of cases, and the bugs that others had."""

import json
import math

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.constraints import FixAtoms

from ase_uq.dynamics.checks import Bonds, Check, EnergySpike, Finite, MaxTemperature, Snapshot

NAN, INF = math.nan, math.inf


def snapshot(atoms: Atoms | None = None, energy: float | None = None, forces=None) -> Snapshot:
    return Snapshot(Atoms("H") if atoms is None else atoms, energy, forces, None)


def reasons(check: Check, snapshots, through=lambda state: json.loads(json.dumps(state))) -> list[str]:
    state, found = None, []
    for each in snapshots:
        # Through JSON at every frame: a state that does not survive it could not be restarted.
        state, reason = check.inspect(through(state), each)
        found.append(reason)
    return found


def energies(check: EnergySpike, values) -> list[int]:
    """Frames at which the check finds something, for one atom."""
    return [
        frame for frame, reason in enumerate(reasons(check, [snapshot(energy=value) for value in values])) if reason
    ]


def moved(atoms: Atoms, index: int, position) -> Atoms:
    other = atoms.copy()
    other.positions[index] = position
    return other


# --- Finite ----------------------------------------------------------------------------------------------------------


def test_a_frame_that_is_finite_is_fine():
    water = molecule("H2O")
    assert Finite().inspect(None, snapshot(water, -3.0, np.zeros((3, 3)))) == (None, "")
    assert Finite().inspect(None, snapshot(water)) == (None, "")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_named(value):
    water = molecule("H2O")
    forces = np.zeros((3, 3))
    forces[1:, 2] = value
    _, reason = Finite().inspect(None, snapshot(moved(water, 2, [0, value, 0]), value, forces))
    assert reason == (
        f"position of atom 2 (H) is not finite; energy is {value:g} eV; "
        "force of atom 1 (H) is not finite, and 1 more atom"
    )


# --- Temperature -----------------------------------------------------------------------------------------------------


def at_temperature(atoms: Atoms, kelvin: float) -> Atoms:
    """With momenta of exactly this temperature."""
    atoms = atoms.copy()
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    atoms.set_momenta(atoms.get_momenta() * math.sqrt(kelvin / atoms.get_temperature()))
    return atoms


@pytest.mark.parametrize(("kelvin", "found"), [(0.0, False), (300.0, False), (999.0, False), (1001.0, True)])
@pytest.mark.parametrize("atoms", [Atoms("H"), molecule("H2O")], ids=str)
def test_a_temperature_above_the_limit_is_found(atoms, kelvin, found):
    _, reason = MaxTemperature(1000).inspect(None, snapshot(at_temperature(atoms, kelvin)))
    assert bool(reason) == found
    if found:
        assert reason == "temperature is 1001 K, more than 1000 K"


def test_the_temperature_is_that_of_the_atoms_that_can_move():
    free = at_temperature(molecule("H2O"), 900)
    held = free.copy()
    held.set_constraint(FixAtoms([0, 1]))
    held.set_momenta(held.get_momenta())  # of the fixed atoms now zero
    mine = float(held.get_momenta()[2] @ held.get_momenta()[2] / held.get_masses()[2] / (3 * units.kB))
    assert mine != pytest.approx(900, rel=0.05)
    assert MaxTemperature(0.99 * mine).inspect(None, snapshot(held))[1]
    assert not MaxTemperature(1.01 * mine).inspect(None, snapshot(held))[1]


def test_atoms_that_cannot_move_have_no_temperature():
    atoms = molecule("H2O")
    atoms.set_constraint(FixAtoms([0, 1, 2]))
    assert MaxTemperature(1).inspect(None, snapshot(atoms)) == (None, "")


def test_a_temperature_that_is_nan_is_found():
    atoms = Atoms("H")
    atoms.set_momenta([[NAN, 0, 0]])
    assert MaxTemperature(1000).inspect(None, snapshot(atoms))[1] == "temperature is nan K, more than 1000 K"


@pytest.mark.parametrize("kelvin", [0, -300, NAN, INF])
def test_a_temperature_limit_that_is_not_positive_is_refused(kelvin):
    with pytest.raises(ValueError, match=r"the highest temperature is a positive number in K, not"):
        MaxTemperature(kelvin)


# --- Bonds -----------------------------------------------------------------------------------------------------------

WATER = molecule("H2O")  # O-H 0.968 A; covalent radii O 0.66, H 0.31
ALONG = (WATER.positions[1] - WATER.positions[0]) / np.linalg.norm(WATER.positions[1] - WATER.positions[0])


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0.97, ""),
        (1.40, ""),
        (
            1.46,
            "bond of atom 0 (O) and atom 1 (H) is broken: 1.46 A, more than 1.5 times the 0.969 A of the first frame",
        ),
        (30.0, "bond of atom 0 (O) and atom 1 (H) is broken: 30 A, more than 1.5 times the 0.969 A of the first frame"),
        (0.60, ""),
        (
            0.57,
            "atom 0 (O) and atom 1 (H) are fused: 0.57 A apart, less than 0.6 times the 0.97 A of their covalent radii",
        ),
    ],
)
def test_broken_and_fused_bonds_are_found(length, reason):
    frame = moved(WATER, 1, WATER.positions[0] + length * ALONG)
    assert reasons(Bonds(), [snapshot(WATER), snapshot(frame)]) == ["", reason]


def test_the_worst_bond_is_named_and_the_others_are_counted():
    frame = WATER.copy()
    frame.positions[1:] = [[0, 0, 5], [0, 0, -9]]
    _, reason = reasons(Bonds(), [snapshot(WATER), snapshot(frame)])
    assert reason.startswith("bond of atom 0 (O) and atom 2 (H) is broken: 9.12 A")
    assert reason.endswith(", and 1 more bond")


def test_atoms_without_a_bond_fuse_too_and_both_kinds_are_told():
    start = Atoms("H2OO", [[0, 0, 0], [0, 0, 0.74], [5, 0, 0], [0, 9, 0]])
    frame = moved(moved(start, 1, [0, 0, 4]), 3, [5, 0, 0.5])
    _, reason = reasons(Bonds(), [snapshot(start), snapshot(frame)])
    broken, fused = reason.split("; ")
    assert broken.startswith("bond of atom 0 (H) and atom 1 (H) is broken")
    assert fused.startswith("atom 2 (O) and atom 3 (O) are fused: 0.5 A apart")


def test_what_was_close_from_the_start_is_not_found_and_what_comes_later_is():
    start = Atoms("H3", [[0, 0, 0], [0, 0, 0.3], [3, 0, 0]])
    later = moved(start, 2, [0.3, 0, 0])
    assert reasons(Bonds(), [snapshot(start), snapshot(start)]) == ["", ""]
    (_, reason) = reasons(Bonds(), [snapshot(start), snapshot(later)])
    assert reason.startswith("atom 0 (H) and atom 2 (H) are fused")


def test_a_bond_that_comes_back_is_whole_again():
    far = moved(WATER, 1, WATER.positions[0] + 2 * ALONG)
    found = reasons(Bonds(), map(snapshot, [WATER, far, WATER]))
    assert [bool(reason) for reason in found] == [False, True, False]


@pytest.mark.parametrize("cell", [[6, 6, 6], [[6, 0, 0], [3, 5.2, 0], [0, 0, 6]]])
def test_a_bond_across_the_cell_is_as_long_as_within_it(cell):
    inside = WATER.copy()
    inside.set_cell(cell)
    inside.pbc = True
    inside.center()
    across = inside.copy()
    across.positions -= across.positions[0]
    across.wrap()
    assert np.ptp(across.positions, axis=0).max() > 3
    check = Bonds()
    states = [check.inspect(None, snapshot(atoms))[0] for atoms in (inside, across)]
    assert [bond[2] for bond in states[0]["bonds"]] == pytest.approx([bond[2] for bond in states[1]["bonds"]])
    assert len(states[0]["bonds"]) == 2
    # The molecule wanders through the wall: no bond breaks, and one that does is found.
    assert reasons(check, [snapshot(inside), snapshot(across)]) == ["", ""]
    stretched = across.copy()
    stretched.positions[1] += ALONG
    assert "is broken: 1.97 A" in reasons(check, [snapshot(inside), snapshot(stretched)])[1]


def test_atoms_fuse_across_the_cell():
    start = Atoms("H2", [[0.1, 0, 0], [3, 0, 0]], cell=[6, 6, 6], pbc=True)
    frame = moved(start, 1, [5.9, 0, 0])
    assert "are fused: 0.2 A apart" in reasons(Bonds(), [snapshot(start), snapshot(frame)])[1]


def test_an_atom_fuses_with_its_own_image_in_a_cell_that_collapses():
    start = bulk("Cu", cubic=False)
    collapsed = start.copy()
    collapsed.set_cell(start.cell * 0.5, scale_atoms=True)
    assert "atom 0 (Cu) and atom 0 (Cu) are fused: 1.28 A" in reasons(Bonds(), map(snapshot, [start, collapsed]))[1]


def test_thermal_motion_of_a_crystal_breaks_nothing():
    start = bulk("Cu", cubic=True) * (3, 3, 3)
    hot = start.copy()
    hot.rattle(0.15, seed=0)
    assert reasons(Bonds(), [snapshot(start), snapshot(hot)]) == ["", ""]


def test_bonds_that_cannot_be_measured_are_told_and_forget_nothing():
    gone = moved(WATER, 1, [NAN, 0, 0])
    broken = moved(WATER, 1, WATER.positions[0] + 2 * ALONG)
    first, second, third, fourth = reasons(Bonds(), map(snapshot, [gone, WATER, gone, broken]))
    assert first == third == "bonds cannot be measured: positions or cell are not finite"
    assert second == ""
    assert "is broken" in fourth


def test_atoms_that_change_partners_are_watched_for_fusion_alone():
    far = moved(WATER, 1, WATER.positions[0] + 9 * ALONG)
    fused = moved(WATER, 1, WATER.positions[0] + 0.1 * ALONG)
    _, second, third = reasons(Bonds(longest=INF), map(snapshot, [WATER, far, fused]))
    assert second == ""
    assert "are fused" in third


@pytest.mark.parametrize("longest", [1, 0.5, 0, -1, NAN])
def test_a_longest_bond_within_its_first_length_is_refused(longest):
    with pytest.raises(ValueError, match=r"longest is above 1, in units of the first length of a bond, not"):
        Bonds(longest=longest)


@pytest.mark.parametrize("shortest", [1, 0, -1, 2, NAN])
def test_a_shortest_distance_outside_its_range_is_refused(shortest):
    with pytest.raises(ValueError, match=r"shortest lies between 0 and 1, in units of the sum of covalent radii"):
        Bonds(shortest=shortest)


# --- Energy ----------------------------------------------------------------------------------------------------------

QUIET = np.random.default_rng(0).normal(size=400).tolist()


def test_a_quiet_energy_is_fine():
    assert energies(EnergySpike(), QUIET) == []


@pytest.mark.parametrize("jump", [12.0, -12.0])
def test_a_jump_is_found_once(jump):
    assert energies(EnergySpike(sd=10), [*QUIET[:150], *(np.array(QUIET[150:]) + jump)]) == [150]


def test_the_window_does_not_include_the_sample():
    # IPSuite's did. Then no sample is ever further than sqrt(n - 1) standard deviations from the mean, and a check
    # at 10 of a window of 50 could never fire, however large the jump.
    values = [*QUIET[:50], 1e6]
    with_itself = (values[-1] - np.mean(values)) / np.std(values)
    assert with_itself == pytest.approx(math.sqrt(50), rel=1e-3)
    assert energies(EnergySpike(sd=10, window=50), values) == [50]
    _, reason = EnergySpike(sd=10, window=50).inspect(values[:-1], snapshot(energy=values[-1]))
    expected = (values[-1] - np.mean(values[:-1])) / np.std(values[:-1])
    assert f"{expected:.3g} standard deviations of the 50 samples before it (limit 10)" in reason


def test_a_one_sided_test_is_not_inverted():
    # IPSuite's `larger_only` took the absolute value exactly where it should not.
    rises, falls = [*QUIET[:50], 30.0], [*QUIET[:50], -30.0]
    assert energies(EnergySpike(rises_only=True), rises) == [50]
    assert energies(EnergySpike(rises_only=True), falls) == []
    assert energies(EnergySpike(), rises) == energies(EnergySpike(), falls) == [50]


def test_nothing_is_found_before_there_is_a_window():
    assert energies(EnergySpike(), [*QUIET[:19], 1e3]) == []
    assert energies(EnergySpike(), [*QUIET[:20], 1e3]) == [20]


def test_the_window_forgets():
    old = (1e3 * np.array(QUIET[:100])).tolist()
    assert energies(EnergySpike(window=50), [*old, *QUIET[100:150], 20.0]) == [150]
    assert energies(EnergySpike(window=150), [*old, *QUIET[100:150], 20.0]) == []


def test_rounding_of_a_relaxation_at_rest_is_no_jump():
    assert energies(EnergySpike(), [*[-1000.0] * 100, -1000.0 + 5e-3, -1000.0]) == []
    assert energies(EnergySpike(), [*[-1000.0] * 100, -1000.0 + 2e-2]) == [100]


def test_the_energy_is_that_of_an_atom_and_the_reason_says_how_far_it_jumped():
    frames = [snapshot(WATER, 3 * value) for value in [*([1.0, 1.2] * 25), 3.1]]
    assert reasons(EnergySpike(), frames)[-1] == (
        "energy rose by 2 eV per atom, 20 standard deviations of the 50 samples before it (limit 10)"
    )
    assert reasons(EnergySpike(), [*frames[:-1], snapshot(WATER, -9.0)])[-1].startswith(
        "energy fell by 4.1 eV per atom"
    )


def test_an_energy_that_is_not_finite_is_found_and_does_not_blind_the_check():
    assert energies(EnergySpike(), [NAN, *QUIET[:50], INF, 1e3]) == [0, 51, 52]
    assert reasons(EnergySpike(), [snapshot(energy=-INF)]) == ["energy is -inf eV"]


def test_frames_without_an_energy_are_passed_over():
    with_gaps = [*QUIET[:25], None, *QUIET[25:50], None, 1e3]
    assert energies(EnergySpike(), with_gaps) == [52]


@pytest.mark.parametrize("sd", [0, -1, NAN, INF])
def test_a_spread_that_is_not_positive_is_refused(sd):
    with pytest.raises(ValueError, match=r"the sd of an energy spike is a positive number in standard deviations, not"):
        EnergySpike(sd=sd)


@pytest.mark.parametrize("window", [19, 0, -5])
def test_a_window_that_knows_no_spread_is_refused(window):
    with pytest.raises(ValueError, match=rf"window of an energy spike has at least 20 samples, not {window}"):
        EnergySpike(window=window)


# --- All of them -----------------------------------------------------------------------------------------------------

CHECKS = [Finite(), MaxTemperature(500), Bonds(), EnergySpike(sd=3, window=20, rises_only=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_restart_at_any_frame_changes_nothing_and_reasons_are_plain(check, seed):
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(60):
        atoms = WATER.copy()
        atoms.positions += rng.normal(0, 0.2, (3, 3)) if number else 0
        atoms.set_momenta(rng.normal(0, 0.5, (3, 3)))
        if number and rng.random() < 0.1:
            atoms.positions[0, 0] = NAN
        energy = None if number % 10 == 3 else rng.normal() + 9 * (number == 45)
        frames.append(Snapshot(atoms, energy, rng.normal(size=(3, 3)), None))
    found = reasons(check, frames)
    assert found == reasons(check, frames, through=lambda state: state)
    assert 0 < sum(map(bool, found)) < len(frames)
    assert all(reason.isascii() for reason in found)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_check_changes_neither_the_state_nor_the_frame_that_it_is_handed(check):
    atoms = at_temperature(WATER, 300)
    before = atoms.copy()
    frame = Snapshot(atoms, -1.0, np.ones((3, 3)), 0.0)
    state, _ = check.inspect(None, frame)
    kept = json.dumps(state)
    check.inspect(state, frame)
    assert json.dumps(state) == kept
    assert atoms == before
    assert np.array_equal(atoms.get_momenta(), before.get_momenta())


@pytest.mark.parametrize("change", ["fewer", "more", "others"])
def test_bonds_begin_anew_with_other_atoms(change):
    """Bonds are pairs of indices, which mean other atoms then: with fewer atoms they even lie beyond the structure."""
    first = molecule("CH3OH")
    second = {"fewer": first[:-1], "more": first + Atoms("He", [[5, 5, 5]]), "others": molecule("N2H4")}[change]
    broken = moved(second, 0, [9, 9, 9])
    assert reasons(Bonds(), [snapshot(first), snapshot(second), snapshot(second)]) == ["", "", ""]
    assert "is broken" in reasons(Bonds(), [snapshot(first), snapshot(second), snapshot(broken)])[2]
