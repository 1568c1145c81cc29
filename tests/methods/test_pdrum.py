"""P-DRUM: symmetries of its force predictions, scales of its scores, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy import stats
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.errors import LabelError, PotentialMismatch, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods import make_method
from ase_uq.methods.base import Head
from ase_uq.methods.pdrum.conservative import force_features, forces_of, functions_of
from ase_uq.methods.pdrum.directions import WIDTH, directions, mixing_of
from ase_uq.methods.pdrum.head import PDRUMHead, Variant, magnitude_of_unit
from ase_uq.methods.pdrum.method import PDRUM
from ase_uq.numerics.training import Training
from ase_uq.stream.labelled import LabelledStream
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

VARIANTS: tuple[Variant, ...] = ("norm", "diff", "diff_conservative")
SHORT = Training(hidden=(16,), max_epochs=15)
FULL = Training(hidden=(32,), patience=10)
ROTATION = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
ROTATION *= np.sign(np.linalg.det(ROTATION))
DEVIATIONS = {1: 0.1, 6: 0.3, 8: 0.6}  # eV/Å


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(24, seed=1)


@pytest.fixture(scope="module")
def heads(backend: Backend, frames: list[Atoms]) -> dict[str, Head]:
    return {name: fit_head(PDRUM(name, training=SHORT), backend, frames) for name in VARIANTS}


@pytest.fixture(scope="module")
def noisy(backend: Backend) -> list[Atoms]:
    """Labels are the potential's own forces and energies with Gaussian noise, known for each element."""
    random = np.random.default_rng(3)
    frames = []
    for _ in range(500):
        atoms = molecule(str(random.choice(["H2O", "CH3OH", "CO2", "C2H4"])))
        atoms.positions += random.normal(scale=0.05, size=atoms.positions.shape)
        frames.append(atoms)
    forward_pass = forward_pass_of(backend, frames)
    assert forward_pass.forces is not None
    for index, atoms in enumerate(frames):
        own = forward_pass.forces[forward_pass.frame_of_atom == index].numpy()
        deviation = np.array([DEVIATIONS[z] for z in atoms.numbers])[:, None]
        atoms.set_array("REF_forces", own + deviation * random.normal(size=own.shape))
        atoms.info["REF_energy"] = float(forward_pass.energy[index]) + 0.05 * len(atoms) * random.normal()
    return frames


def turned(frames: list[Atoms], rotation: np.ndarray) -> list[Atoms]:
    out = [atoms.copy() for atoms in frames]
    for atoms in out:
        atoms.positions = atoms.positions @ rotation.T
        atoms.arrays["REF_forces"] = atoms.arrays["REF_forces"] @ rotation.T
    return out


def expected(head: Head, forward_pass: ForwardPass) -> Tensor:
    assert isinstance(head, PDRUMHead)
    return head.expected_forces(forward_pass)


class TestSymmetries:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_order_of_atoms_does_not_matter(
        self, heads: dict[str, Head], backend: Backend, frames: list[Atoms], variant: str
    ):
        head = heads[variant]
        atoms = frames[0]
        order = np.random.default_rng(0).permutation(len(atoms))
        one, other = (head(forward_pass_of(backend, [a], gradients=True)) for a in (atoms, atoms[order]))
        torch.testing.assert_close(other.forces, one.forces[order], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(other.energies, one.energies[order], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(other.energy, one.energy, rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_scores_do_not_turn(self, heads: dict[str, Head], backend: Backend, frames: list[Atoms], variant: str):
        head = heads[variant]
        one, other = (
            head(forward_pass_of(backend, some, gradients=True)) for some in (frames, turned(frames, ROTATION))
        )
        torch.testing.assert_close(other.forces, one.forces, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(other.energy, one.energy, rtol=1e-7, atol=1e-12)

    # The conservative one takes no vectors, built or not.
    @pytest.mark.parametrize(("variant", "built"), [("diff", False), ("diff", True), ("diff_conservative", False)])
    def test_expected_forces_turn(self, backend: Backend, frames: list[Atoms], variant: str, built: bool):
        def prepared(frames: list[Atoms]) -> ForwardPass:
            forward_pass = forward_pass_of(backend, frames, gradients=True)
            return replace(forward_pass, vectors=None) if built else forward_pass

        stream = LabelledStream(backend, frames, Serial(), batch_atoms=100, forces=True, gradients=True)
        batches = [(replace(e, vectors=None) if built else e, targets) for e, targets in stream]
        head = PDRUM(variant, training=SHORT).fit(batches, Serial())
        one, other = (expected(head, prepared(some)) for some in (frames, turned(frames, ROTATION)))
        assert float(one.norm()) > 0
        torch.testing.assert_close(
            other, one @ torch.from_numpy(ROTATION).T, rtol=1e-7, atol=1e-7 * float(one.abs().max())
        )

    def test_expected_forces_of_the_conservative_variant_are_a_gradient(
        self, heads: dict[str, Head], backend: Backend, frames: list[Atoms]
    ):
        """The derivative of a gradient is symmetric (no curl), and a structure does not pull itself along."""
        head = heads["diff_conservative"]
        atoms = molecule("H2O")
        atoms.rattle(0.1, seed=2)

        def at(shift: np.ndarray) -> np.ndarray:
            moved = atoms.copy()
            moved.positions += shift.reshape(-1, 3)
            return expected(head, forward_pass_of(backend, [moved], gradients=True)).numpy()

        assert np.abs(at(np.zeros(9)).sum(0)).max() < 1e-10
        step = 1e-4
        jacobian = np.array([(at(step * axis) - at(-step * axis)).ravel() for axis in np.eye(9)]) / (2 * step)
        assert np.abs(jacobian).max() > 0.01
        np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-5 * np.abs(jacobian).max())

    def test_the_equivariant_one_is_none(self, heads: dict[str, Head], backend: Backend, frames: list[Atoms]):
        """What the conservative variant is for: gates and vectors alone have a curl and a net force."""
        head = heads["diff"]
        assert float(expected(head, forward_pass_of(backend, [frames[0]])).sum(0).norm()) > 1e-4


class TestPaperMode:
    """F-diff from invariants, as published."""

    @pytest.fixture(scope="class")
    @classmethod
    def wrong(cls, backend: Backend) -> list[Atoms]:
        """Systematic errors that turn with the molecule, whose atoms all differ; in one orientation."""
        frames = [molecule("HCOOH") for _ in range(200)]
        for seed, atoms in enumerate(frames):
            atoms.rattle(0.03, seed=seed)
        forward_pass = forward_pass_of(backend, frames)
        assert forward_pass.forces is not None
        assert forward_pass.vectors is not None
        share = torch.randn(forward_pass.vectors.shape[2], generator=torch.Generator().manual_seed(8)).double()
        errors = 0.1 * forward_pass.vectors @ share
        for index, atoms in enumerate(frames):
            own = forward_pass.frame_of_atom == index
            atoms.set_array("REF_forces", (forward_pass.forces + errors)[own].numpy())
        return frames

    @staticmethod
    def share_explained(backend: Backend, variant: str, frames: list[Atoms], new: list[Atoms]) -> tuple[float, float]:
        """Explained share of the square of the residuals, and that of the predictions over it."""
        head = fit_head(PDRUM(variant, training=FULL), backend, frames)
        forward_pass = forward_pass_of(backend, new)
        assert forward_pass.forces is not None
        residuals = torch.from_numpy(np.concatenate([a.arrays["REF_forces"] for a in new])) - forward_pass.forces
        found = expected(head, forward_pass)
        total = float(residuals.square().sum())
        return 1 - float((residuals - found).square().sum()) / total, float(found.square().sum()) / total

    @pytest.mark.filterwarnings("ignore:diff_invariant predicts forces:ase_uq.errors.UQWarning")
    def test_predicts_nothing_when_structures_are_turned(self, backend: Backend, wrong: list[Atoms]):
        random = stats.special_ortho_group(3, seed=4)
        tumbling = [turned([atoms], random.rvs())[0] for atoms in wrong]
        fixed, _ = self.share_explained(backend, "diff_invariant", wrong[:150], wrong[150:])
        assert fixed > 0.9
        explained, size = self.share_explained(backend, "diff_invariant", tumbling[:150], tumbling[150:])
        assert explained < 0.05
        assert size < 0.1
        explained, _ = self.share_explained(backend, "diff", tumbling[:150], tumbling[150:])
        assert explained > 0.9

    def test_says_so(self, backend: Backend, frames: list[Atoms]):
        with pytest.warns(UQWarning, match="do not turn with the structure"):
            fit_head(PDRUM("diff_invariant", training=SHORT), backend, frames)


class TestScales:
    @pytest.mark.parametrize(("target", "quantile"), [("magnitude", 0.9), ("log", 0.9), ("quantile", 0.5)])
    def test_gaussian_residuals_give_back_their_deviation(
        self, backend: Backend, noisy: list[Atoms], target: str, quantile: float
    ):
        head = fit_head(PDRUM(target=target, quantile=quantile, training=FULL), backend, noisy)
        forward_pass = forward_pass_of(backend, noisy)
        raw = head(forward_pass)
        for z, deviation in DEVIATIONS.items():
            found = float(raw.forces[forward_pass.numbers == z].mean().sqrt())
            assert found == pytest.approx(deviation, rel=0.08), z
        # 500 structures, and the potential's own energies are exact.
        assert float(raw.energy.mean().sqrt()) == pytest.approx(0.05, rel=0.15)
        assert head.settings["forces"]["out_of_fold"] == pytest.approx(1, abs=0.1)
        assert head.settings["energy"]["out_of_fold"] == pytest.approx(1, abs=0.25)

    @pytest.mark.parametrize("components", [1, 3])
    def test_units_are_those_of_the_chi_distribution(self, components: int):
        draws = stats.chi(components)
        assert magnitude_of_unit("magnitude", 0.5, components) == pytest.approx(draws.mean())
        assert magnitude_of_unit("quantile", 0.7, components) == pytest.approx(draws.ppf(0.7))
        assert np.log(magnitude_of_unit("log", 0.5, components)) == pytest.approx(draws.expect(np.log), rel=1e-6)

    def test_units_in_the_literature(self):
        assert magnitude_of_unit("magnitude", 0.5, 3) == pytest.approx(1.5958, abs=1e-4)
        assert magnitude_of_unit("magnitude", 0.5, 1) == pytest.approx(0.7979, abs=1e-4)

    def test_the_score_of_a_diff_is_the_mean_square_of_what_it_expects(
        self, heads: dict[str, Head], backend: Backend, frames: list[Atoms]
    ):
        head = heads["diff"]
        forward_pass = forward_pass_of(backend, frames)
        mean_square = expected(head, forward_pass).square().mean(1)
        torch.testing.assert_close(head(forward_pass).forces[:, 0, 0], mean_square)

    def test_energy_is_a_sum_over_atoms(self, heads: dict[str, Head], backend: Backend, frames: list[Atoms]):
        """Twice the structure, twice the predicted error, the same per atom."""
        head = heads["norm"]
        atoms = frames[0]
        far = atoms.copy()
        far.positions += 100
        one, two = head(forward_pass_of(backend, [atoms])), head(forward_pass_of(backend, [atoms + far]))
        torch.testing.assert_close(two.energy, one.energy, rtol=1e-6, atol=0)


class TestConservative:
    def test_finds_an_energy_that_is_missing(self, backend: Backend):
        frames = labelled_frames(36, seed=21)
        forward_pass = forward_pass_of(backend, frames, gradients=True)
        functions = functions_of(forward_pass.features.shape[1], 0)
        weights = torch.randn(functions.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        missing = forces_of(forward_pass, functions, weights)
        torch.testing.assert_close(force_features(forward_pass, functions) @ weights, missing)
        assert forward_pass.forces is not None
        for index, atoms in enumerate(frames):
            own = forward_pass.frame_of_atom == index
            atoms.arrays["REF_forces"] = (forward_pass.forces + missing)[own].numpy()
        head = fit_head(PDRUM("diff_conservative", training=SHORT), backend, frames[:24])
        new = forward_pass_of(backend, frames[24:], gradients=True)
        truth = forces_of(new, functions, weights)
        assert float((expected(head, new) - truth).norm()) < 0.01 * float(truth.norm())

    def test_asks_for_gradients_and_no_other_does(self, heads: dict[str, Head]):
        for variant in VARIANTS:
            wanted = variant == "diff_conservative"
            assert PDRUM(variant).gradients == wanted
            assert heads[variant].gradients == wanted

    def test_without_them_says_what_to_do(self, heads: dict[str, Head], backend: Backend, frames: list[Atoms]):
        head = heads["diff_conservative"]
        with pytest.raises(ValueError, match="gradients=True"):
            head(forward_pass_of(backend, frames))


class TestDirections:
    def test_many_channels_are_mixed(self):
        mixing = mixing_of(100, seed=0)
        assert mixing.shape == (100, WIDTH)
        assert torch.equal(mixing, mixing_of(100, seed=0))
        assert not torch.equal(mixing, mixing_of(100, seed=1))

    def test_own_channels_are_taken_as_they_are(self, backend: Backend, frames: list[Atoms]):
        forward_pass = forward_pass_of(backend, frames[:3])
        assert forward_pass.vectors is not None
        own = forward_pass.vectors[:, :, :5]
        torch.testing.assert_close(directions(replace(forward_pass, vectors=own), mixing_of(5, seed=0)), own)

    @pytest.mark.parametrize("n_vectors", [3, 0])
    def test_those_of_another_potential_are_refused(self, backend: Backend, frames: list[Atoms], n_vectors: int):
        with pytest.raises(
            PotentialMismatch, match=r"mixing of (3|119) rows, but this one has 54 vectors for each atom"
        ):
            directions(forward_pass_of(backend, frames[:1]), mixing_of(n_vectors, 0))

    def test_built_ones_vanish_at_a_centre_of_symmetry(self, backend: Backend):
        forward_pass = replace(forward_pass_of(backend, [molecule("CO2")]), vectors=None)
        found = directions(forward_pass, mixing_of(0, seed=0))
        assert found.shape == (3, 3, WIDTH)
        carbon = forward_pass.numbers == 6
        assert float(found[carbon].abs().max()) < 1e-12
        assert float(found[~carbon].norm(dim=(1, 2)).min()) > 1e-4

    def test_built_ones_fade_where_the_neighbour_list_ends(self, backend: Backend):
        def at(distance: float) -> Tensor:
            forward_pass = forward_pass_of(backend, [Atoms("CO", [(0, 0, 0), (0, 0, distance)])])
            return directions(replace(forward_pass, vectors=None), mixing_of(0, seed=0))

        cutoff = forward_pass_of(backend, [molecule("H2O")]).edges.cutoff
        assert float(at(cutoff - 1e-3).norm()) < 1e-5
        assert float(at(cutoff + 1e-3).norm()) == 0


class TestFit:
    def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_state(self, backend: Backend, frames: list[Atoms]):
        forward_pass = forward_pass_of(backend, frames)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, second = (fit_head(PDRUM("diff", training=SHORT), backend, frames) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first(forward_pass).forces, second(forward_pass).forces)
        other = fit_head(PDRUM("diff", training=replace(SHORT, seed=1)), backend, frames)
        assert not torch.equal(first(forward_pass).forces, other(forward_pass).forces)

    @pytest.mark.parametrize("variant", ["norm", "diff_conservative"])
    def test_does_not_judge_itself_on_frames_it_learned_from(self, backend: Backend, variant: str):
        """Labels of noise can be learned by heart, and the other folds tell nothing of them."""
        random = np.random.default_rng(2)
        frames = labelled_frames(24, seed=2, spread=(0.1, 0.1001))
        for atoms in frames:
            atoms.arrays["REF_forces"] = 1e3 * random.normal(size=atoms.positions.shape)
        training = Training(hidden=(128,), learning_rate=1e-2, weight_decay=0.0, max_epochs=100)
        head = fit_head(PDRUM(variant, training=training), backend, frames)
        found = head.settings["forces"]["out_of_fold"]
        assert found == pytest.approx(1, abs=0.2) if variant == "norm" else found > 2

    def test_without_energies_theirs_is_that_of_the_forces(self, backend: Backend, frames: list[Atoms]):
        bare = [atoms.copy() for atoms in frames]
        for atoms in bare:
            del atoms.info["REF_energy"]
        head = fit_head(PDRUM(training=SHORT), backend, bare)
        assert "energy" not in head.settings
        raw = head(batch := forward_pass_of(backend, frames))
        mean = torch.stack([raw.forces[batch.frame_of_atom == k].mean() for k in range(batch.n_frames)])
        torch.testing.assert_close(raw.energy[:, 0], mean)
        torch.testing.assert_close(raw.energies, raw.forces[:, 0, 0])

    def test_frames_without_forces_are_left_out(self, backend: Backend, frames: list[Atoms]):
        partly = [atoms.copy() for atoms in frames]
        for atoms in partly[::4]:
            del atoms.arrays["REF_forces"]
        raw = fit_head(PDRUM(training=SHORT), backend, partly)(forward_pass_of(backend, frames))
        assert bool(raw.forces.isfinite().all())

    def test_no_forces_at_all_are_refused(self, backend: Backend, frames: list[Atoms]):
        bare = [atoms.copy() for atoms in frames]
        for atoms in bare:
            del atoms.arrays["REF_forces"]
        with pytest.raises(LabelError, match=r"there are 0 with reference forces\. .* 'bll' and 'kernel' need none"):
            fit_head(PDRUM(training=SHORT), backend, bare)

    def test_few_frames_are_refused_with_the_number_needed(self, backend: Backend, frames: list[Atoms]):
        with pytest.raises(LabelError, match="5 folds need 10 labelled training frames, there are 7"):
            fit_head(PDRUM(training=SHORT), backend, frames[:7])

    def test_the_potentials_forces_are_needed(self, backend: Backend, frames: list[Atoms]):
        stream = LabelledStream(backend, frames, Serial(), batch_atoms=100, forces=False)
        with pytest.raises(ValueError, match="evaluate the training frames with them"):
            PDRUM(training=SHORT).fit(stream, Serial())

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"variant": "lab"}, "variants are norm, diff"),
            ({"target": "mode"}, "targets are magnitude, log, quantile"),
            ({"variant": "diff", "target": "log"}, "only the variant 'norm' has a log target"),
            ({"quantile": 1.5}, "between 0 and 1"),
            ({"folds": 1}, "2 folds or more"),
        ],
    )
    def test_hyper_parameters_are_checked(self, wrong: dict, message: str):
        with pytest.raises(ValueError, match=message):
            make_method("pdrum", **wrong)
