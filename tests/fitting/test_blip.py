"""Training of stochastic weights: the loss against MACE's own, what it learns, how it goes on, and what it refuses."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write

from ase_uq import Predictor, UncertainCalculator, embedded, fit, load_backend, read_frames
from ase_uq.backends.base import Backend
from ase_uq.backends.stochastic import Blip, Drawn
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import ArtefactError, InputError, LabelError
from ase_uq.fitting import blip as module
from ase_uq.fitting.blip import BlipTraining, mc_dropout, train_blip
from ase_uq.fitting.blip_loss import losses
from ase_uq.forward_pass import Targets
from ase_uq.testing.methods import ELEMENTS, labelled_frames

SHORT = BlipTraining(max_epochs=3, draws=2, batch=6, dropout=1e-3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def toy() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def train() -> list[Atoms]:
    return labelled_frames(24, seed=1, cell=6.0)


@pytest.fixture(scope="module")
def validation() -> list[Atoms]:
    return labelled_frames(10, seed=2, cell=6.0)


@pytest.fixture(scope="module")
def finished(toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("blip") / "toy.st"
    train_blip(toy, train, validation, out=out, training=SHORT, progress=False)
    return out


@contextmanager
def killed_before(epoch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training in here ends as by Ctrl-C when this many epochs are done."""
    own = module._Run.next_epoch

    def killed(run: Any) -> None:
        if run.epoch == epoch:
            raise KeyboardInterrupt
        own(run)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "next_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def nothing(rates: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(rates), dtype=torch.float64)


class TestLoss:
    def test_the_likelihood_of_one_draw_is_maces_own_loss(self):
        """With weights n/2σ², as MACE averages over the labels of a batch; up to what predictions do not change."""
        own = load_backend("embedded:mace", device="cpu", dtype="float64")
        from mace.modules.loss import WeightedEnergyForcesLoss
        from mace.tools.torch_geometric import Batch

        frames = read_frames(embedded.path("train_300K.xyz"))[:3]
        batch = own.collate(frames)
        model = own.stochastic()
        noise = model.noise(1, 3)
        from ase_uq.numerics.variational import Rates

        drawn = model.draw(batch, Rates.constant(list(model.groups), 1e-4), noise)
        counts = torch.tensor([len(atoms) for atoms in frames])
        targets = module._targets(frames, None, torch.device("cpu"))
        sigma = torch.tensor([0.05, 0.002], dtype=torch.float64)
        found = float(losses(drawn, targets, counts, sigma.log(), "elbo", nothing).sum().detach())
        n_forces, n_energies = targets.forces.numel(), len(frames)
        constant = n_forces * math.log(0.05 * math.sqrt(2 * math.pi))
        constant += n_energies * math.log(0.002 * math.sqrt(2 * math.pi))
        oracle = WeightedEnergyForcesLoss(n_energies / (2 * 0.002**2), n_forces / (2 * 0.05**2)).double()
        labels = {"energy": targets.energy, "forces": targets.forces}
        reference = Batch.from_dict(batch.data | labels)
        predicted = {"energy": drawn.energy[0].detach(), "forces": drawn.forces[0].detach()}
        assert found - constant == pytest.approx(float(oracle(reference, predicted)), rel=1e-6)

    @pytest.mark.parametrize("loss", ["elbo", "crps"])
    def test_a_missing_energy_adds_nothing_and_spoils_no_gradient(self, loss: str):
        generator = torch.Generator().manual_seed(0)
        counts = torch.tensor([2, 1])
        forces = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
        energy = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
        truth = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        levels = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
        drawn = Drawn(energy, forces, None, torch.ones(2, 1, dtype=torch.float64))
        found = []
        for second in (float("nan"), 0.3):
            targets = Targets(torch.arange(2), torch.tensor([1.0, second], dtype=torch.float64), truth)
            found.append(losses(drawn, targets, counts, levels, loss, nothing))
        without, with_it = (one.detach() for one in found)
        assert float(without[0]) == float(with_it[0])
        assert float(without[1]) != float(with_it[1])
        slope, of_levels = torch.autograd.grad(found[0].sum(), (energy, levels), allow_unused=True)
        assert bool(slope.isfinite().all())
        assert slope[:, 1].tolist() == [0, 0, 0]
        # Units of the CRPS are not trained: larger ones would be a smaller loss.
        assert of_levels is None if loss == "crps" else bool(of_levels.isfinite().all())
        # The first frame written out.
        if loss == "elbo":
            values = ((truth[:2] - forces[:, :2]) / math.exp(-1)).square() / 2 - 1 + 0.5 * math.log(2 * math.pi)
            own = ((0.5 - energy[:, 0] / 2) / math.exp(0.5)).square() / 2 + 0.5 + 0.5 * math.log(2 * math.pi)
            assert float(without[0]) == pytest.approx(float((values.sum((1, 2)) + own.detach()).mean()))

    def test_relative_entropy_belongs_to_the_lower_bound_only(self):
        drawn = Drawn(torch.zeros(2, 1).double(), torch.zeros(2, 1, 3).double(), None, torch.full((1, 1), 0.5))
        targets = Targets(torch.arange(1), torch.zeros(1).double(), torch.zeros(1, 3).double())
        counts, levels = torch.tensor([1]), torch.zeros(2).double()
        with_it, without = (
            float(losses(drawn, targets, counts, levels, "elbo", kl)) for kl in (lambda rates: 3 * rates[:, 0], nothing)
        )
        assert with_it - without == pytest.approx(1.5)
        assert float(losses(drawn, targets, counts, levels, "crps", lambda rates: 3 * rates[:, 0])) == 0


@pytest.mark.parametrize("loss", ["elbo", "crps"])
def test_training_lowers_the_loss_and_learns_how_much_noise_there_may_be(
    toy: Backend, train: list[Atoms], validation: list[Atoms], loss: str, tmp_path: Path
):
    before = toy.identity.fingerprint
    # The lower bound begins with more noise than the toy bears, the score with less than its errors.
    how = replace(SHORT, loss=loss, **({"dropout": 0.1, "learning_rate": 3e-4} if loss == "elbo" else {}))
    frames = {"training": train, "validation": validation}
    at_first = module._Run.started(toy, toy.stochastic(), how, frames, None).validated()
    made = train_blip(toy, train, validation, out=tmp_path / "a.st", training=how, progress=False)
    assert made.training is not None
    history = [held_out for _, held_out in made.training["history"]]
    assert made.training["best_loss"] == min(history) < at_first
    rates = made.rates(toy.stochastic().invariants(toy.collate(validation)))
    change = rates.log() - math.log(how.dropout / (1 - how.dropout))
    assert float(-change.max() if loss == "elbo" else change.max()) > 0.1
    assert toy.identity.fingerprint == before
    assert load_backend(ToyCalculator(ELEMENTS)).with_blip(made).identity.fingerprint != before


def test_the_file_is_what_is_returned_and_nothing_else_is_left(toy: Backend, finished: Path, validation: list[Atoms]):
    assert [path.name for path in finished.parent.iterdir()] == ["toy.st"]
    loaded = Blip.load(finished)
    assert loaded.training["loss"] == "elbo"
    assert len(loaded.training["noise_levels"]) == 2
    members = toy.with_blip(loaded).forward(toy.collate(validation)).members
    assert members.energy.shape == (8, 10)


def test_a_training_that_was_killed_ends_with_the_same_weights(
    toy: Backend, train: list[Atoms], validation: list[Atoms], finished: Path, tmp_path: Path, monkeypatch
):
    out, own = tmp_path / "a.st", module._Run.next_epoch
    with killed_before(2, monkeypatch):
        train_blip(toy, train, validation, out=out, training=SHORT, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.st.training"]
    epochs = []
    monkeypatch.setattr(module._Run, "next_epoch", lambda run: (epochs.append(run.epoch), own(run)))
    made = train_blip(toy, train, validation, out=out, training=SHORT, progress=False)
    assert epochs == [2]
    expected = Blip.load(finished)
    for name, weight in expected.weights.items():
        assert torch.equal(made.weights[name], weight)
    for name, tensor in expected.rates.named_buffers():
        assert torch.equal(made.rates.get_buffer(name), tensor), name
    assert made.training == expected.training
    assert [path.name for path in tmp_path.iterdir()] == ["a.st"]


@pytest.mark.parametrize("what", ["settings", "frames", "labels"])
def test_what_another_training_left_is_refused(
    toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path, monkeypatch, what: str
):
    def killed(run: Any) -> None:
        run.history.append([0.0, 0.0])
        run.save(tmp_path / "a.st.training")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "next_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_blip(toy, train, validation, out=tmp_path / "a.st", training=SHORT, progress=False)
    how = replace(SHORT, dropout=1e-2) if what == "settings" else SHORT
    frames = train[1:] if what == "frames" else train
    if what == "labels":
        frames = [atoms.copy() for atoms in train]
        frames[3].arrays["REF_forces"] = frames[3].arrays["REF_forces"] + 0.01
    with pytest.raises(
        ArtefactError, match=r"a\.st\.training is what another training left, .*Remove it to begin anew"
    ):
        train_blip(toy, frames, validation, out=tmp_path / "a.st", training=how, progress=False)


def test_it_ends_when_the_validation_loss_has_not_fallen_for_long(
    toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path, monkeypatch
):
    found = iter([4.0, 3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(module._Run, "validated", lambda run: next(found))
    how = replace(SHORT, max_epochs=5, patience=2)
    made = train_blip(toy, train, validation, out=tmp_path / "a.st", training=how, progress=False)
    assert made.training["epochs"] == 4
    assert made.training["best_loss"] == 2.0


def test_if_no_epoch_is_better_the_weights_are_those_of_the_potential(
    toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path, monkeypatch
):
    found = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(module._Run, "validated", lambda run: next(found))
    made = train_blip(
        toy, train, validation, out=tmp_path / "a.st", training=replace(SHORT, max_epochs=2), progress=False
    )
    assert made.training["best_loss"] == 1.0
    for name, weight in toy.stochastic().parameters.items():
        assert torch.equal(made.weights[name], weight)
    rates = made.rates(toy.stochastic().invariants(toy.collate(validation)))
    torch.testing.assert_close(rates, torch.full_like(rates, 1e-3 / (1 - 1e-3)))


def test_a_training_that_was_stopped_may_go_on_for_longer(
    toy: Backend, train: list[Atoms], validation: list[Atoms], finished: Path, tmp_path: Path, monkeypatch
):
    with killed_before(1, monkeypatch):
        short = replace(SHORT, max_epochs=2)
        train_blip(toy, train, validation, out=tmp_path / "a.st", training=short, progress=False)
    made = train_blip(toy, train, validation, out=tmp_path / "a.st", training=SHORT, progress=False)
    expected = Blip.load(finished)
    assert made.training == expected.training
    for name, weight in expected.weights.items():
        assert torch.equal(made.weights[name], weight)


@pytest.mark.filterwarnings("ignore:committee tells nothing about:ase_uq.errors.UQWarning")
def test_members_are_calibrated_as_those_of_a_committee_and_watched_as_such(
    toy: Backend, train: list[Atoms], validation: list[Atoms], finished: Path
):
    one = toy.with_blip(Blip.load(finished))
    held_out = labelled_frames(30, seed=7, cell=6.0)
    model = fit(one, train, held_out, methods=["committee"], progress=False)
    (found,) = Predictor(one, model, ensemble=4).predict(validation[:1])
    for key in ("forces_uncertainty", "energy_uncertainty", "stress_uncertainty", "gamma", "energy_ensemble"):
        assert np.isfinite(found[key]).all(), key
    atoms = validation[0].copy()
    atoms.calc = UncertainCalculator(one, model)
    np.testing.assert_allclose(atoms.get_forces(), found["forces"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(atoms.calc.results["forces_uncertainty"], found["forces_uncertainty"], rtol=1e-9)


def test_a_mace_is_trained(tmp_path: Path, monkeypatch):
    losses = iter([2.0, 1.0])  # so that the epoch is kept, whatever one step is worth
    monkeypatch.setattr(module._Run, "validated", lambda run: next(losses))
    own = load_backend("embedded:mace", device="cpu", dtype="float32")
    frames = read_frames(embedded.path("train_300K.xyz"))[:20]
    how = BlipTraining(max_epochs=1, batch=10, draws=1, loss="elbo")
    made = train_blip(own, frames[::2], frames[1::2], out=tmp_path / "a.st", training=how, progress=False)
    model = own.stochastic()
    moved = [float((made.weights[name] - weight).abs().max()) for name, weight in model.parameters.items()]
    # One step of Adam, whose length is the learning rate; atomic energies are no parameters.
    assert max(moved) == pytest.approx(1e-4, rel=0.1)
    assert made.rates(model.invariants(own.collate(frames[:2]))).shape == (2, len(model.groups))
    found = own.with_blip(made).forward(own.collate(frames[:2]))
    assert float(found.members.forces.std(0).mean()) > 1e-4


class TestDropout:
    def test_rates_are_those_of_the_dropout(self, toy: Backend):
        made = mc_dropout(toy, 0.2, n_members=5, seed=3)
        assert (made.n_members, made.seed, made.training) == (5, 3, {"dropout": 0.2})
        assert made.rates(torch.zeros(2, 1)).tolist() == [[0.25], [0.25]]
        for name, weight in toy.stochastic().parameters.items():
            assert torch.equal(made.weights[name], weight)

    def test_without_dropout_the_committee_says_that_members_agree(
        self, toy: Backend, train: list[Atoms], validation: list[Atoms]
    ):
        one = toy.with_blip(mc_dropout(toy, 0))
        batch = one.collate(validation)
        plain, found = toy.forward(batch), one.forward(batch)
        assert torch.equal(found.forces, plain.forces)
        assert torch.equal(found.energy, plain.energy)
        torch.testing.assert_close(found.members.forces, plain.forces.expand(8, -1, -1), rtol=0, atol=1e-12)


class TestRefusals:
    def test_frames_without_labels(self, toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path):
        bare = [atoms.copy() for atoms in train]
        del bare[2].arrays["REF_forces"]
        with pytest.raises(LabelError, match="training frame 2 has no reference forces"):
            train_blip(toy, bare, validation, out=tmp_path / "a.st", progress=False)
        wrong = [atoms.copy() for atoms in validation]
        wrong[1].arrays["REF_forces"][0, 0] = np.nan
        with pytest.raises(LabelError, match="validation frame 1 has non-finite values in its reference forces"):
            train_blip(toy, train, wrong, out=tmp_path / "a.st", progress=False)
        wrong[1].arrays["REF_forces"] = validation[1].arrays["REF_forces"]
        wrong[1].info["REF_energy"] = np.inf
        with pytest.raises(LabelError, match="validation frame 1 has non-finite values in its reference energy"):
            train_blip(toy, train, wrong, out=tmp_path / "a.st", progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_frames_in_both_sets_and_too_few(self, toy: Backend, train: list[Atoms], tmp_path: Path):
        with pytest.raises(LabelError, match="10 of 10 validation frames are training frames"):
            train_blip(toy, train, train[:10], out=tmp_path / "a.st", progress=False)
        with pytest.raises(LabelError, match="there are 3 validation frames; at least 10 are needed"):
            train_blip(toy, train, train[:3], out=tmp_path / "a.st", progress=False)

    def test_own_forces(self, toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path):
        own = []
        for atoms in train:
            own.append(atoms.copy())
            forward_pass = toy.forward(toy.collate([atoms]))
            own[-1].arrays["REF_forces"] = forward_pass.forces.numpy()
        with pytest.raises(LabelError, match="the training labels are the potential's own forces"):
            train_blip(toy, own, validation, out=tmp_path / "a.st", progress=False)

    def test_outputs(self, toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path):
        (tmp_path / "a.st").write_text("mine")
        with pytest.raises(FileExistsError, match=r"a\.st exists. Give another name, or overwrite it"):
            train_blip(toy, train, validation, out=tmp_path / "a.st", progress=False)
        with pytest.raises(ArtefactError, match=r"cannot write .*no/a\.st"):
            train_blip(toy, train, validation, out=tmp_path / "no" / "a.st", progress=False)
        write(tmp_path / "frames.xyz", train)
        with pytest.raises(ValueError, match=r"frames\.xyz is the input: it would be overwritten"):
            train_blip(
                toy, tmp_path / "frames.xyz", validation, out=tmp_path / "frames.xyz", overwrite=True, progress=False
            )
        assert (tmp_path / "a.st").read_text() == "mine"

    def test_a_potential_whose_weights_cannot_be_drawn(self, train: list[Atoms], validation, tmp_path: Path):
        with pytest.raises(InputError, match="weights of a direct force head cannot be drawn"):
            train_blip(ToyCalculator(ELEMENTS, direct=True), train, validation, out=tmp_path / "a.st", progress=False)

    def test_a_loss_that_explodes(self, toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path):
        how = replace(SHORT, learning_rate=1e200)
        with pytest.raises(ValueError, match=r"the loss became .* in epoch 0\. Train with a lower learning rate"):
            train_blip(toy, train, validation, out=tmp_path / "a.st", training=how, progress=False)

    def test_a_validation_loss_that_is_no_number(
        self, toy: Backend, train: list[Atoms], validation: list[Atoms], tmp_path: Path, monkeypatch
    ):
        monkeypatch.setattr(module._Run, "validated", lambda run: math.nan)
        with pytest.raises(ValueError, match=r"the validation loss became nan in epoch 0\. Train with a lower"):
            train_blip(toy, train, validation, out=tmp_path / "a.st", training=SHORT, progress=False)
        assert not (tmp_path / "a.st").exists()

    def test_a_number_of_members_before_anything_is_trained(self, toy: Backend, tmp_path: Path):
        with pytest.raises(ValueError, match="n_members is 1; a whole number from 2 to 1000 was expected"):
            train_blip(toy, [], [], out=tmp_path / "a.st", n_members=1, progress=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": "mse"}, "loss is 'mse'; elbo or crps was expected"),
            ({"dropout": 1.0}, "dropout is 1.0; a number above 1e-08 and below 0.5 was expected"),
            ({"dropout": -1.0}, "dropout is -1.0; a number above 1e-08 and below 0.5 was expected"),
            ({"dropout": 0.0}, "dropout is 0.0; a number above 1e-08 and below 0.5 was expected"),
            ({"batch": 0}, "batch is 0; a whole number, 1 or more, was expected"),
            ({"max_epochs": 1.5}, "max_epochs is 1.5; a whole number, 1 or more, was expected"),
            ({"seed": 2**63}, "seed is 9223372036854775808; a whole number of at most 4611686018427387904"),
            ({"learning_rate": math.inf}, "learning_rate is inf"),
            ({"loss": "crps", "draws": 1}, "draws is 1, which has no spread; the CRPS needs 2 or more"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0 and kl_weight 1.0; a positive number"),
            ({"kl_weight": -1.0}, "kl_weight -1.0"),
        ],
    )
    def test_settings(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            BlipTraining(**options)
