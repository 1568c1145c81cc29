"""The spread of a committee against loops written out, and what a single potential is told."""

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_uq import Predictor, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError
from ase_uq.methods.committee import Committee, CommitteeHead
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

from .builders import ToyCommittee


@pytest.fixture(scope="module")
def committee() -> Backend:
    return ToyCommittee(members=3)


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(12, seed=11, cell=6.0)


def test_scores_are_the_variances_over_the_members(committee: ToyCommittee, frames: list[Atoms]):
    head = fit_head(Committee(), committee, frames, batch_atoms=20)
    forward_pass = forward_pass_of(committee, frames)
    raw = head(forward_pass)
    alone = [forward_pass_of(member, frames) for member in committee._members]
    forces = np.stack([member.forces.numpy() for member in alone])
    for atom in range(0, len(forward_pass.numbers), 7):
        spread = sum(np.var(forces[:, atom, k], ddof=1) for k in range(3)) / 3
        assert float(raw.forces[atom, 0, 0]) == pytest.approx(spread, rel=1e-10)
    assert raw.forces.shape[1:] == (1, 1)
    for frame, atoms in enumerate(frames):
        per_atom = [float(member.energy[frame]) / len(atoms) for member in alone]
        assert float(raw.energy[frame, 0]) == pytest.approx(np.var(per_atom, ddof=1), rel=1e-8)
        stress = np.var([member.stress[frame].numpy() for member in alone], axis=0, ddof=1).mean()
        assert float(raw.stress[frame, 0]) == pytest.approx(stress, rel=1e-10)
    assert torch.equal(raw.energies, raw.energy[forward_pass.frame_of_atom, 0])


def test_distance_is_the_spread_of_the_forces_in_units_of_training(committee: Backend, frames: list[Atoms]):
    head = fit_head(Committee(), committee, frames, batch_atoms=20)
    raw = head(forward_pass_of(committee, frames))
    assert head.settings["mean_square"] == pytest.approx(float(raw.forces.mean()), rel=1e-12)
    torch.testing.assert_close(raw.distance, raw.forces[:, 0, 0] / raw.forces.mean())


def test_without_a_stress_the_forces_stand_for_it(committee: Backend, frames: list[Atoms]):
    head = fit_head(Committee(), committee, frames)
    forward_pass = forward_pass_of(committee, frames)
    object.__setattr__(forward_pass.members, "stress", None)
    raw = head(forward_pass)
    expected = [float(raw.forces[forward_pass.frame_of_atom == k].mean()) for k in range(len(frames))]
    np.testing.assert_allclose(raw.stress[:, 0], expected, rtol=1e-12)


def test_single_precision_members_lose_nothing_more(committee: Backend, frames: list[Atoms]):
    """Differences of energies of thousands of eV are taken in double precision."""
    forward_pass = forward_pass_of(committee, frames)
    object.__setattr__(forward_pass.members, "energy", forward_pass.members.energy.float())
    assert CommitteeHead({"mean_square": 1.0}, {})(forward_pass).energy.dtype == torch.float64


def test_a_single_potential_is_told_how_to_load_several(frames: list[Atoms]):
    single = load_backend(ToyCalculator(ELEMENTS))
    wanted = r'needs a potential with several members, .*model_paths=\["a\.model", .* SPEC "mace:committee_\*\.model"'
    with pytest.raises(InputError, match=wanted):
        fit_head(Committee(), single, frames)
    with pytest.raises(InputError, match=wanted):
        CommitteeHead({"mean_square": 1.0}, {})(forward_pass_of(single, frames))


def test_a_committee_of_one_potential_is_refused(frames: list[Atoms]):
    same = ToyCommittee(members=3)
    same._members = [same._members[0]] * 3
    with pytest.raises(InputError, match="agree exactly: they are one potential several times"):
        fit_head(Committee(), same, frames)


@pytest.mark.filterwarnings("ignore:committee tells nothing about:ase_uq.errors.UQWarning")
def test_samples_have_the_covariances_of_the_members(committee: ToyCommittee):
    """Also of forces: many samples against the members themselves, up to the calibrated scale of each structure."""
    train, held_out = (labelled_frames(20, seed=seed, cell=6.0) for seed in (1, 2))
    model = fit(committee, train, held_out, methods=["committee"], progress=False)
    frames = labelled_frames(3, seed=5, cell=6.0)
    predictions = Predictor(committee, model, ensemble=3000, ensemble_forces=3000).predict(frames)
    members = forward_pass_of(committee, frames).members
    assert members is not None
    assert members.forces is not None
    found = np.corrcoef([prediction["energy_ensemble"] for prediction in predictions])
    np.testing.assert_allclose(found, np.corrcoef(members.energy.numpy().T), atol=0.05)
    start = 0
    for atoms, prediction in zip(frames, predictions, strict=True):
        rows = members.forces[:, start : start + len(atoms)].reshape(3, -1).numpy()
        start += len(atoms)
        expected, sampled = np.cov(rows.T), np.cov(prediction["forces_ensemble"].reshape(rows.shape[1], -1))
        expected, sampled = expected / np.trace(expected), sampled / np.trace(sampled)
        assert np.abs(sampled - expected).max() < 0.1 * np.abs(expected).max()
    assert members.stress is not None
    for frame, prediction in enumerate(predictions):
        stress = prediction["stress_ensemble"]
        np.testing.assert_allclose(stress.mean(1), prediction["stress"], atol=1e-10)
        spread, std = (x @ [1, 1, 1, 2, 2, 2] / 9 for x in (stress.var(1), prediction["stress_uncertainty"] ** 2))
        assert spread == pytest.approx(std)
        expected, sampled = np.cov(members.stress[:, frame].numpy().T), np.cov(stress)
        expected, sampled = expected / np.trace(expected), sampled / np.trace(sampled)
        assert np.abs(sampled - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:committee tells nothing about:ase_uq.errors.UQWarning")
def test_where_all_members_agree_samples_have_the_calibrated_spread(committee: ToyCommittee):
    train, held_out = (labelled_frames(20, seed=seed, cell=6.0) for seed in (1, 2))
    model = fit(committee, train, held_out, methods=["committee"], progress=False)
    alone = Predictor(committee, model, ensemble=8).predict([Atoms("O", [(0, 0, 0)]), Atoms("H", [(0, 0, 0)])])
    for prediction in alone:
        assert prediction["energy_ensemble"].std() == pytest.approx(prediction["energy_uncertainty"], rel=1e-6)
