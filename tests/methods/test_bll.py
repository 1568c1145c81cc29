"""The Bayesian last layer against dense algebra written out in numpy, brute-force loops and sampling."""

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.forward_pass import ForceLayer, ForwardPass
from ase_uq.methods import available_methods, make_method, method_class
from ase_uq.methods.bll.head import BLLHead
from ase_uq.methods.bll.method import BLL
from ase_uq.methods.bll.projection import projected_leverage
from ase_uq.numerics.sites import sum_over_sites
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames, with_labels

RIDGE = 1e-4


@pytest.fixture(scope="module")
def conservative() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def direct() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS, direct=True))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(30, seed=11)


def numpy_leverage(train: np.ndarray, at: np.ndarray, ridge: float) -> np.ndarray:
    """ũ of centred, standardised features, written out: u·N/γ with u = z (ZᵀZ + N·ridge)⁻¹ zᵀ."""
    centre, spread = train.mean(0), train.std(0)
    scale = np.maximum(spread, 1e-6 * spread.max())
    z, new = (train - centre) / scale, (at - centre) / scale
    inverse = np.linalg.inv(z.T @ z + len(z) * ridge * np.eye(z.shape[1]))
    gamma = np.trace(z.T @ z @ inverse)
    return np.einsum("id,de,ie->i", new, inverse, new) * len(z) / gamma


class TestDistance:
    @pytest.mark.parametrize("features", ["latent", "last_layer"])
    def test_is_dense_algebra(self, conservative: Backend, frames: list[Atoms], features: str):
        head = fit_head(BLL(features=features, ridge=RIDGE), conservative, frames, batch_atoms=20)
        train, new = forward_pass_of(conservative, frames), forward_pass_of(conservative, labelled_frames(5, seed=12))

        def columns(forward_pass: ForwardPass) -> np.ndarray:
            latent = features == "latent"
            return (forward_pass.features if latent else forward_pass.energy_layer.features).numpy()

        for forward_pass in (train, new):
            expected = numpy_leverage(columns(train), columns(forward_pass), RIDGE)
            # Condition number 1e5 of the solve.
            np.testing.assert_allclose(head(forward_pass).distance, expected, rtol=1e-9)

    def test_sums_to_the_number_of_training_rows(self, conservative: Backend, frames: list[Atoms]):
        distance = fit_head(BLL(ridge=RIDGE), conservative, frames)(forward_pass_of(conservative, frames)).distance
        assert float(distance.sum()) == pytest.approx(len(distance), rel=1e-10)

    def test_does_not_depend_on_the_size_of_the_training_set(self, conservative: Backend, frames: list[Atoms]):
        once, thrice = (fit_head(BLL(ridge=RIDGE), conservative, frames * copies) for copies in (1, 3))
        unseen = forward_pass_of(conservative, labelled_frames(5, seed=12))
        torch.testing.assert_close(thrice(unseen).distance, once(unseen).distance, rtol=1e-9, atol=0)

    def test_a_smaller_ridge_never_lowers_it_before_scaling(self, conservative: Backend, frames: list[Atoms]):
        """u = z(cov + ridge)⁻¹z is monotone in the ridge; ũ divides it by γ, which the settings hold."""
        unseen = forward_pass_of(conservative, labelled_frames(5, seed=12))
        found = []
        for ridge in (1e-2, 1e-4, 1e-6):
            head = fit_head(BLL(ridge=ridge), conservative, frames)
            found.append(head(unseen).distance * head.settings["atoms"]["effective"])
        assert bool((found[0] <= found[1] * (1 + 1e-9)).all())
        assert bool((found[1] <= found[2] * (1 + 1e-6)).all())

    def test_features_that_never_vary_do_not_break_it(self, conservative: Backend):
        """Only water: every pair with carbon is absent from training, and then seen."""
        water = with_labels([_rattled("H2O", seed) for seed in range(12)])
        head = fit_head(BLL(), conservative, water)
        assert bool(torch.isfinite(head(forward_pass_of(conservative, water)).distance).all())
        new = head(forward_pass_of(conservative, [molecule("CH3OH")])).distance
        assert bool(torch.isfinite(new).all())
        assert float(new.max()) > 1e3


class TestFeatures:
    @pytest.mark.parametrize("features", ["latent", "last_layer"])
    @pytest.mark.parametrize("ridge", [1e-9, 1e-2])
    def test_they_are_standardised(self, conservative: Backend, frames: list[Atoms], features: str, ridge: float):
        head = fit_head(BLL(features=features, ridge=ridge), conservative, frames, batch_atoms=20)
        train, new = forward_pass_of(conservative, frames), forward_pass_of(conservative, labelled_frames(5, seed=12))
        rows, at = ((e.features if features == "latent" else e.energy_layer.features).numpy() for e in (train, new))
        spread = rows.std(0)
        assert spread.min() < 1e-2 * spread.max(), "some of the toy's features hardly vary"
        expected = (at - rows.mean(0)) / np.maximum(spread, 1e-2 * spread.max())
        assert head.measures
        # The smallest ridge leaves 1e-9 of the triangular solve.
        np.testing.assert_allclose(head.features(new), expected, rtol=1e-5, atol=1e-7)

    def test_a_method_that_measures_nothing_has_none(self, conservative: Backend, frames: list[Atoms]):
        head = fit_head(make_method("pops"), conservative, frames)
        assert not head.measures
        with pytest.raises(NotImplementedError, match="POPSHead has no features to measure distances in"):
            head.features(forward_pass_of(conservative, frames[:1]))


class TestEnergy:
    @pytest.mark.parametrize("ridge", [RIDGE, 1e-9])
    def test_is_dense_algebra(self, conservative: Backend, frames: list[Atoms], ridge: float):
        """ũ_s = u_s·N/γ with u = x(XᵀX + Λ)⁻¹xᵀ, x = (1, scaled ψ̃ about its mean) and no prior on the intercept."""
        head = fit_head(BLL(ridge=ridge), conservative, frames)
        train, new = forward_pass_of(conservative, frames), forward_pass_of(conservative, labelled_frames(5, seed=12))

        def means(forward_pass: ForwardPass) -> np.ndarray:
            phi = forward_pass.energy_layer.features.numpy()
            return np.stack([phi[forward_pass.frame_of_atom == k].mean(0) for k in range(forward_pass.n_frames)])

        psi = means(train)
        centre, scale = psi.mean(0), psi.std(0)
        scale = np.maximum(scale, 1e-6 * scale.max())

        def design(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([np.ones((len(rows), 1)), (rows - centre) / scale], 1)

        gram = design(psi).T @ design(psi)
        found = head.settings["energy"]
        assert found["rows"] == len(frames)
        assert found["prior_precision"] >= ridge * len(frames) * (1 - 1e-12)
        inverse = np.linalg.inv(gram + found["prior_precision"] * np.diag([0.0] + [1.0] * len(scale)))
        gamma = np.trace(gram @ inverse)
        assert found["effective"] == pytest.approx(gamma, rel=1e-6)
        raw = head(new)
        rows = design(means(new))
        expected = np.einsum("id,de,ie->i", rows, inverse, rows) * len(frames) / gamma
        np.testing.assert_allclose(raw.energy[:, 0], expected, rtol=1e-6)
        atoms = design(new.energy_layer.features.numpy())
        expected = np.einsum("id,de,ie->i", atoms, inverse, atoms) * len(frames) / gamma
        np.testing.assert_allclose(raw.energies, expected, rtol=1e-6)

    def test_labels_without_noise_leave_the_ridge_as_prior(self, conservative: Backend, frames: list[Atoms]):
        """Their evidence wants no prior, and the posterior would then be the rounding of the gram matrix."""
        exact = with_labels([atoms.copy() for atoms in frames], noise=0.0)
        head = fit_head(BLL(ridge=RIDGE), conservative, exact)
        assert head.settings["energy"]["boundary"] == "data"
        assert head.settings["energy"]["prior_precision"] == pytest.approx(RIDGE * len(frames))

    def test_a_structure_that_falls_apart_is_less_certain(self, conservative: Backend, frames: list[Atoms]):
        """Features vanish with the neighbours; about zero the leverage would vanish with them."""
        head = fit_head(BLL(), conservative, frames)
        whole, apart = frames[0].copy(), frames[0].copy()
        apart.positions *= 10
        near, far = head(forward_pass_of(conservative, [whole])), head(forward_pass_of(conservative, [apart]))
        assert bool((far.energy > near.energy).all())
        assert float(far.energies.min()) > 1 / head.settings["energy"]["effective"]

    def test_second_score_and_stress_are_the_mean_distance(self, conservative: Backend, frames: list[Atoms]):
        raw = fit_head(BLL(), conservative, frames)(batch := forward_pass_of(conservative, frames))
        expected = [float(raw.distance[batch.frame_of_atom == k].mean()) for k in range(len(frames))]
        np.testing.assert_allclose(raw.energy[:, 1], expected, rtol=1e-12)
        np.testing.assert_allclose(raw.stress[:, 0], expected, rtol=1e-12)

    def test_mean_over_training_structures_is_one(self, conservative: Backend, frames: list[Atoms]):
        raw = fit_head(BLL(ridge=RIDGE), conservative, frames)(forward_pass_of(conservative, frames))
        assert float(raw.energy[:, 0].mean()) == pytest.approx(1.0, rel=1e-9)

    def test_without_energy_labels_the_distance_stands_for_it(self, conservative: Backend, frames: list[Atoms]):
        unlabelled = [atoms.copy() for atoms in frames]
        for atoms in unlabelled:
            del atoms.info["REF_energy"]
        head = fit_head(BLL(), conservative, unlabelled)
        raw = head(forward_pass_of(conservative, frames))
        assert raw.energy.shape == (len(frames), 1)
        assert torch.equal(raw.energies, raw.distance)
        assert "energy" not in head.settings

    def test_only_labelled_frames_count(self, conservative: Backend, frames: list[Atoms]):
        partly = [atoms.copy() for atoms in frames]
        for atoms in partly[10:]:
            del atoms.info["REF_energy"]
        head = fit_head(BLL(), conservative, partly, batch_atoms=10_000)
        assert head.settings["energy"]["rows"] == 10
        assert head.settings["atoms"]["rows"] == sum(len(atoms) for atoms in frames)


class TestSites:
    def test_without_reach_scores_are_the_sums_over_sites(self, conservative: Backend, frames: list[Atoms]):
        radii = (1.5, 3.0)
        head = fit_head(BLL(radii=radii, reach=0.0), conservative, frames)
        (periodic,) = labelled_frames(1, seed=5, cell=4.2)
        for atoms in (frames[0], periodic):
            batch = forward_pass_of(conservative, [atoms])
            raw = head(batch)
            assert raw.forces.shape == (len(atoms), 1, 3)
            np.testing.assert_array_equal(raw.forces[:, 0, 0], raw.distance)
            np.testing.assert_allclose(raw.forces[:, 0, 1:], sum_over_sites(raw.distance, batch.edges, radii))

    def test_reach_adds_the_mean_over_the_receptive_field(self, conservative: Backend, frames: list[Atoms]):
        """s_k + reach · n_k · m, written out over the neighbours of a molecule."""
        radii, reach = (1.5, 3.0), 0.3
        head = fit_head(BLL(radii=radii, reach=reach), conservative, frames)
        atoms = next(atoms for atoms in frames if len(atoms) == 6)
        raw = head(forward_pass_of(conservative, [atoms]))
        own = raw.distance.numpy()
        separation = atoms.get_all_distances()

        def weight(i: int, j: int, radius: float) -> float:
            r = separation[i, j]
            return 1.0 if i == j else 0.5 * (1 + np.cos(np.pi * r / radius)) * (r < radius)

        everyone = range(len(atoms))
        mean = own
        for _ in range(3):
            mean = [
                sum(weight(i, j, 3.0) * mean[j] for j in everyone) / sum(weight(i, j, 3.0) for j in everyone)
                for i in everyone
            ]
        for i in everyone:
            expected = [own[i] + reach * mean[i]]
            expected += [sum(weight(i, j, r) * (own[j] + reach * mean[i]) for j in everyone) for r in radii]
            np.testing.assert_allclose(raw.forces[i, 0], expected, rtol=1e-10)

    def test_a_head_without_reach_in_its_settings_has_none(self, conservative: Backend, frames: list[Atoms]):
        """Such as one of a file of format 1."""
        head = fit_head(BLL(reach=0.0), conservative, frames)
        settings = {name: value for name, value in head.settings.items() if name != "reach"}
        batch = forward_pass_of(conservative, frames[:3])
        assert torch.equal(BLL.load(settings, dict(head.state_dict()))(batch).forces, head(batch).forces)

    def test_a_negative_reach_is_refused(self):
        for reach in (-0.1, float("nan")):
            with pytest.raises(ValueError, match="the reach is 0 or above"):
                BLL(reach=reach)

    def test_two_far_copies_have_the_values_of_one(self, conservative: Backend, frames: list[Atoms]):
        head = fit_head(BLL(), conservative, frames)
        far = frames[0].copy()
        far.positions += 50.0
        one, two = (head(forward_pass_of(conservative, [atoms])) for atoms in (frames[0], frames[0] + far))
        n_atoms = len(frames[0])
        torch.testing.assert_close(two.forces, one.forces.repeat(2, 1, 1), rtol=1e-9, atol=0)
        torch.testing.assert_close(two.distance[n_atoms:], one.distance, rtol=1e-9, atol=0)
        torch.testing.assert_close(two.energy, one.energy, rtol=1e-9, atol=0)

    def test_turning_a_molecule_changes_nothing(self, conservative: Backend, frames: list[Atoms]):
        head = fit_head(BLL(ridge=RIDGE), conservative, frames)
        one, two = (head(forward_pass_of(conservative, [atoms])) for atoms in (frames[0], _turned(frames[0])))
        torch.testing.assert_close(two.forces, one.forces, rtol=1e-8, atol=0)


# One structure of each kind that the projection treats in its own way.
SHAPES = {
    "bent": molecule("H2O"),
    "linear": molecule("CO2"),
    "linear, askew": Atoms("OCO", np.outer([-1.2, 0.0, 1.2], [0.48, 0.6, 0.64]) + 0.3),
    "one atom": Atoms("O", [(0.3, 0.2, 0.1)]),
    "periodic": molecule("CH3OH", cell=[5.0] * 3, pbc=True),
    "two atoms": molecule("CO"),
}


def dense_projector(atoms: Atoms, torque_free: bool, force_free: bool = True) -> np.ndarray:
    """P as a 3N × 3N matrix: I less the projector on rigid motions, by singular values."""
    n_atoms = len(atoms)
    x = atoms.positions - atoms.positions.mean(0)
    modes = [np.tile(axis, n_atoms) for axis in np.eye(3)] * force_free
    modes += [np.cross(axis, x).ravel() for axis in np.eye(3)] * torque_free
    u, s, _ = np.linalg.svd(np.array(modes).T, full_matrices=False)
    u = u[:, s > 1e-6 * s.max()]
    return np.eye(3 * n_atoms) - u @ u.T


class TestProjection:
    def layer_of(self, atoms: Atoms, seed: int, width: int = 6, common: float = 0.0) -> ForceLayer:
        random = torch.Generator().manual_seed(seed)
        features = torch.randn(len(atoms), width, generator=random, dtype=torch.float64) + common
        return ForceLayer(
            features=features,
            weights=torch.zeros(width, 3, dtype=torch.float64),
            base=torch.zeros(len(atoms), 3, dtype=torch.float64),
            force_free=True,
            torque_free=torch.tensor([not atoms.pbc.any()]),
        )

    def root(self, width: int = 6) -> Tensor:
        return torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)

    @pytest.mark.parametrize("kind", SHAPES)
    @pytest.mark.parametrize("seed", range(3))
    def test_is_dense_matrix_algebra(self, direct: Backend, kind: str, seed: int):
        """Cov(F) = P (ΦRRᵀΦᵀ ⊗ I_3) Pᵀ; its diagonal, with P as a full matrix."""
        atoms = SHAPES[kind]
        layer, root = self.layer_of(atoms, seed), self.root()
        rows = (layer.features @ root).numpy()
        projector = dense_projector(atoms, torque_free=bool(layer.torque_free))
        covariance = projector @ np.kron(rows @ rows.T, np.eye(3)) @ projector.T
        found = projected_leverage(layer, root, forward_pass_of(direct, [atoms]))
        expected = np.diag(covariance).reshape(-1, 3)
        np.testing.assert_allclose(found, expected, atol=1e-10 * max(1.0, covariance.max()))

    def test_mixed_batches_are_singles(self, direct: Backend):
        frames = list(SHAPES.values())
        layers = [self.layer_of(atoms, k) for k, atoms in enumerate(frames)]
        joined = dataclasses.replace(
            layers[0],
            features=torch.cat([layer.features for layer in layers]),
            torque_free=torch.cat([layer.torque_free for layer in layers]),
        )
        together = projected_leverage(joined, self.root(), forward_pass_of(direct, frames))
        alone = [
            projected_leverage(layer, self.root(), forward_pass_of(direct, [atoms]))
            for layer, atoms in zip(layers, frames, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)

    def test_head_without_any_projection(self, direct: Backend):
        atoms = SHAPES["bent"]
        layer = dataclasses.replace(self.layer_of(atoms, 0), force_free=False, torque_free=torch.tensor([False]))
        found = projected_leverage(layer, self.root(), forward_pass_of(direct, [atoms]))
        expected = (layer.features @ self.root()).square().sum(1, keepdim=True).expand(-1, 3)
        torch.testing.assert_close(found, expected)

    def test_torque_alone(self, direct: Backend):
        """A head that keeps the net force and loses the torque: its rotations are about the centre."""
        atoms = SHAPES["bent"]
        layer = dataclasses.replace(self.layer_of(atoms, 0), force_free=False)
        rows = (layer.features @ self.root()).numpy()
        projector = dense_projector(atoms, torque_free=True, force_free=False)
        covariance = projector @ np.kron(rows @ rows.T, np.eye(3)) @ projector.T
        found = projected_leverage(layer, self.root(), forward_pass_of(direct, [atoms]))
        np.testing.assert_allclose(found, np.diag(covariance).reshape(-1, 3), atol=1e-10 * covariance.max())

    @pytest.mark.parametrize("kind", ["bent", "periodic"])
    def test_is_the_spread_of_posterior_samples_through_orbs_own_code(self, direct: Backend, kind: str):
        pytest.importorskip("orb_models")
        from orb_models.forcefield.models.forcefield_utils import maybe_remove_net_force_and_torque

        atoms = SHAPES[kind]
        layer, root, count = self.layer_of(atoms, 1), self.root(), 4000
        weights = torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        samples = torch.einsum("id,de,sea->sia", layer.features, root, weights)
        graph = _OrbGraph(atoms, count)
        removed = maybe_remove_net_force_and_torque(graph, samples.reshape(-1, 3), True, True)  # pyright: ignore
        found = removed.reshape(count, len(atoms), 3).square().mean(0)
        expected = projected_leverage(layer, root, forward_pass_of(direct, [atoms]))
        # The variance of 4000 normal samples has a relative standard error of sqrt(2 / 4000) = 0.022; 5 of them,
        # and for components that the projection makes zero as much of the largest's rounding.
        torch.testing.assert_close(found, expected, rtol=0.11, atol=1e-10)

    def test_leaving_it_out_overestimates_where_features_have_a_common_part(self, direct: Backend):
        atoms = SHAPES["bent"]
        layer, root = self.layer_of(atoms, 0, common=10.0), self.root()
        projected = projected_leverage(layer, root, forward_pass_of(direct, [atoms]))
        unprojected = (layer.features @ root).square().sum(1)
        assert float(unprojected.mean() / projected.mean()) > 30

    def test_the_net_force_has_no_variance(self, direct: Backend):
        """With the net force gone a lone atom cannot be uncertain, and two atoms are equally so."""
        one, two = SHAPES["one atom"], SHAPES["two atoms"]
        alone = projected_leverage(self.layer_of(one, 0), self.root(), forward_pass_of(direct, [one]))
        torch.testing.assert_close(alone, torch.zeros(1, 3, dtype=torch.float64))
        pair = projected_leverage(self.layer_of(two, 0), self.root(), forward_pass_of(direct, [two]))
        torch.testing.assert_close(pair[0], pair[1])
        # CO lies along z: across it, a force pair is a torque.
        torch.testing.assert_close(pair[:, :2], torch.zeros(2, 2, dtype=torch.float64), atol=1e-12, rtol=0)

    def test_turning_a_molecule_keeps_the_trace(self, direct: Backend):
        atoms = molecule("CH3CH2OH")
        layer, root = self.layer_of(atoms, 2), self.root()
        before, after = (projected_leverage(layer, root, forward_pass_of(direct, [a])) for a in (atoms, _turned(atoms)))
        torch.testing.assert_close(after.sum(1), before.sum(1), rtol=1e-10, atol=0)
        assert not torch.allclose(after, before)


class TestDirectHead:
    def test_force_score_is_dense_algebra(self, direct: Backend, frames: list[Atoms]):
        head = fit_head(BLL(ridge=RIDGE), direct, frames, batch_atoms=30)
        train = forward_pass_of(direct, frames)
        assert train.force_layer is not None
        phi = train.force_layer.features.numpy().copy()
        for k in range(train.n_frames):
            own = train.frame_of_atom.numpy() == k
            phi[own] -= phi[own].mean(0)
        scale = np.sqrt((phi**2).mean(0))
        scale = np.maximum(scale, 1e-6 * scale.max())
        z = phi / scale
        found = head.settings["force"]
        inverse = np.linalg.inv(z.T @ z + found["prior_precision"] * np.eye(len(scale)))
        gamma = np.trace(z.T @ z @ inverse)
        assert found["rows"] == len(phi)
        assert found["effective"] == pytest.approx(gamma, rel=1e-8)
        atoms = frames[0]
        rows = z[: len(atoms)]
        covariance = np.kron(rows @ inverse @ rows.T, np.eye(3)) * len(phi) / gamma
        projector = dense_projector(atoms, torque_free=True)
        expected = np.diag(projector @ covariance @ projector).reshape(-1, 3)
        raw = head(forward_pass_of(direct, [atoms]))
        np.testing.assert_allclose(raw.forces[:, :, 0], expected, rtol=1e-8, atol=1e-10)

    def test_scores_of_the_sites_stand_beside_it(self, direct: Backend, frames: list[Atoms]):
        raw = fit_head(BLL(radii=(2.0,), reach=0.0), direct, frames)(forward_pass_of(direct, frames[:3]))
        assert raw.forces.shape[1:] == (3, 3)
        torch.testing.assert_close(raw.forces[:, :, 1], raw.distance[:, None].expand(-1, 3))

    def test_prior_and_noise_are_those_of_the_evidence(self, direct: Backend, frames: list[Atoms]):
        """λ = Kγσ²/‖B‖², MacKay's fixed point, from the head's settings and the data alone."""
        found = fit_head(BLL(ridge=1e-9), direct, frames).settings["force"]
        train = forward_pass_of(direct, frames)
        assert train.force_layer is not None
        phi = train.force_layer.features.numpy().copy()
        for k in range(train.n_frames):
            phi[train.frame_of_atom == k] -= phi[train.frame_of_atom == k].mean(0)
        target = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames]) - train.force_layer.base.numpy()
        scale = np.sqrt((phi**2).mean(0))
        z = phi / np.maximum(scale, 1e-6 * scale.max())
        prior = found["prior_precision"]
        assert found["boundary"] == ""
        weights = np.linalg.solve(z.T @ z + prior * np.eye(z.shape[1]), z.T @ target)
        rest = ((target - z @ weights) ** 2).sum() + prior * (weights**2).sum()
        assert found["noise"] == pytest.approx(np.sqrt(rest / target.size), rel=1e-6)
        fixed_point = 3 * found["effective"] * found["noise"] ** 2 / (weights**2).sum()
        assert prior == pytest.approx(fixed_point, rel=1e-5)

    def test_only_atoms_with_forces_count(self, direct: Backend, frames: list[Atoms]):
        partly = [atoms.copy() for atoms in frames]
        for atoms in partly[10:]:
            del atoms.arrays["REF_forces"]
        head = fit_head(BLL(), direct, partly, batch_atoms=10_000)
        assert head.settings["force"]["rows"] == sum(len(atoms) for atoms in partly[:10])


def test_the_same_frames_give_the_same_bits_after_saving(direct: Backend, frames: list[Atoms]):
    head = fit_head(BLL(), direct, frames)
    again = BLL.load(head.settings, {name: tensor.clone() for name, tensor in head.state_dict().items()})
    assert isinstance(again, BLLHead)
    batch = forward_pass_of(direct, frames)
    assert torch.equal(again(batch).forces, head(batch).forces)


class TestHyperParameters:
    def test_are_found_by_name(self):
        assert "bll" in available_methods()
        assert method_class("bll") is BLL
        assert make_method("bll", features="last_layer", ridge=1e-3) == BLL("last_layer", 1e-3)

    @pytest.mark.parametrize("features", ["", "Latent", "mace"])
    def test_unknown_features_are_refused(self, features):
        with pytest.raises(ValueError, match=f"features are 'latent' or 'last_layer', not '{features}'"):
            BLL(features=features)

    @pytest.mark.parametrize("ridge", [0.0, -1e-9, 1.0, float("nan")])
    def test_a_ridge_outside_its_range_is_refused(self, ridge: float):
        with pytest.raises(ValueError, match="the ridge lies between 0 and 1"):
            BLL(ridge=ridge)

    @pytest.mark.parametrize("radii", [(0.0,), (2.0, -1.0), (float("nan"),)])
    def test_radii_that_are_no_lengths_are_refused(self, radii: tuple[float, ...]):
        with pytest.raises(ValueError, match=r"radii are lengths in Å"):
            BLL(radii=radii)

    def test_unknown_method_is_refused(self):
        with pytest.raises(ValueError, match=r"no method 'blll'\. Did you mean bll\? There are: bll"):
            make_method("blll")


def _rattled(name: str, seed: int) -> Atoms:
    atoms = molecule(name)
    atoms.rattle(0.1, seed=seed)
    return atoms


def _turned(atoms: Atoms) -> Atoms:
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    return turned


class _OrbGraph:
    """What orb's projection reads of a batch of copies of one structure."""

    def __init__(self, atoms: Atoms, copies: int) -> None:
        self.n_node = torch.full((copies,), len(atoms))
        self.positions = torch.from_numpy(np.tile(atoms.positions, (copies, 1)))
        cell = torch.from_numpy(atoms.cell.array.copy())
        self.system_features = {"cell": cell.expand(copies, 3, 3)}
