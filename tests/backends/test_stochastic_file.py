"""The file of stochastic weights: what it holds, what it is refused for, and the SPEC that loads it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.mace.loading import save_potential
from ase_uq.backends.stochastic import Blip
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import ArtefactError, PotentialMismatch
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file

from .builders import make_mace, water
from .drawn import blip_of, mace_backend, rates_of, toy_backend


@pytest.fixture(scope="module", params=["mace", "toy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return mace_backend() if request.param == "mace" else toy_backend()


def test_too_few_members(backend: Backend):
    with pytest.raises(ValueError, match="n_members is 1; a whole number from 2 to 1000 was expected"):
        replace(blip_of(backend), n_members=1)


def test_it_holds_all(backend: Backend, tmp_path: Path):
    blip = replace(blip_of(backend), training={"loss": "elbo"})
    blip.save(tmp_path / "a.st")
    loaded = Blip.load(tmp_path / "a.st")
    one, other = backend.with_blip(blip), backend.with_blip(loaded)
    assert one.identity.fingerprint == other.identity.fingerprint
    assert one.identity.fingerprint != backend.identity.fingerprint
    batch = one.collate([water()])
    assert torch.equal(one.forward(batch).members.forces, other.forward(batch).members.forces)
    assert (loaded.n_members, loaded.seed, loaded.training) == (3, 5, {"loss": "elbo"})
    assert "Blip(potential=Identity(" in repr(loaded)


def test_the_spec_loads_it(tmp_path: Path):
    own = load_backend("embedded:mace", device="cpu", dtype="float64")
    blip_of(own).save(tmp_path / "a.st")
    found = load_backend(f"embedded:mace?blip={tmp_path / 'a.st'}", device="cpu", dtype="float64")
    assert found.forward(found.collate([water()])).members.energy.shape == (3, 1)
    assert found.name == "mace"
    both = load_backend(f"embedded:mace?head=Default?blip={tmp_path / 'a.st'}", device="cpu", dtype="float64")
    assert both.identity.fingerprint == found.identity.fingerprint


def test_a_spec_that_names_no_file():
    with pytest.raises(ValueError, match=r"'toy:\?blip=' names no file after \?blip="):
        load_backend("toy:?blip=")
    with pytest.raises(ArtefactError, match=r"there is no file no\.st"):
        load_backend("toy:?blip=no.st")


def test_members_and_seed_are_part_of_the_identity(backend: Backend):
    one = backend.with_blip(blip_of(backend))
    for change, message in (
        ({"n_members": 4}, "blip_members was 3, here it is 4"),
        ({"seed": 6}, "blip_seed was 5, here it is 6"),
        ({"rates": rates_of(backend, 0.1)}, "blip_rates was"),
    ):
        other = backend.with_blip(replace(blip_of(backend), **change))
        with pytest.raises(PotentialMismatch, match=message):
            other.check_identity(one.identity)
        if "rates" in change:  # which further training may change
            other.check_architecture(one.identity)
            continue
        with pytest.raises(PotentialMismatch, match=message):
            other.check_architecture(one.identity)
    with pytest.raises(PotentialMismatch, match="blip_members was None, here it is 3"):
        one.check_identity(backend.identity)


def test_another_potential_is_refused(backend: Backend):
    blip = blip_of(backend)
    other = load_backend(ToyCalculator(seed=1)) if backend.name == "toy" else mace_backend(seed=1)
    advice = r"Load the potential that it was trained from, or train again with `ase-uq blip`\."
    with pytest.raises(PotentialMismatch, match=rf"of other weights: features .* differ by .* {advice}"):
        other.with_blip(blip)
    wrong = mace_backend() if backend.name == "toy" else toy_backend()
    with pytest.raises(PotentialMismatch, match=rf"trained from another potential: .* was .*, here .*{advice}"):
        wrong.with_blip(blip)


def test_the_same_potential_in_another_precision_is_accepted():
    own, single = (load_backend("embedded:mace", device="cpu", dtype=dtype) for dtype in ("float64", "float32"))
    members = [b.with_blip(blip_of(own)).forward(b.collate([water()])).members for b in (own, single)]
    torch.testing.assert_close(members[1].forces.double(), members[0].forces, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_members": 1}, r"header.n_members is 1, a whole number from 2 to 1000 was expected"),
        ({"seed": "x"}, r"header.seed is 'x'"),
        ({"rates": {"groups": ["energy"]}}, r"has no 'alpha'"),
        ({"potential": []}, r"header.potential is \[\], an object was expected"),
    ],
)
def test_wrong_contents(change: dict, message: str, tmp_path: Path):
    own = toy_backend()
    blip_of(own).save(tmp_path / "a.st")
    header, tensors = read_tensor_file(tmp_path / "a.st", "stochastic weights file", 1)
    write_tensor_file(tmp_path / "a.st", "stochastic weights file", 1, header | change, tensors)
    with pytest.raises(ArtefactError, match=rf"a\.st is not what training writes: .*{message}.*Make the file again"):
        Blip.load(tmp_path / "a.st")


def test_another_kind_of_file(tmp_path: Path):
    save_potential(make_mace(), tmp_path / "a.st")
    with pytest.raises(
        ArtefactError, match=r"an ase_uq MACE potential; an ase_uq stochastic weights file was expected"
    ):
        Blip.load(tmp_path / "a.st")


def test_weights_of_another_architecture(backend: Backend):
    blip = blip_of(backend)
    name = next(iter(blip.weights))
    for weights in ({**blip.weights, name: torch.zeros(3)}, {**blip.weights, "more": torch.zeros(1)}):
        with pytest.raises(ArtefactError, match=r"the stochastic weights do not fit the potential: .* differs"):
            backend.with_blip(replace(blip, weights=weights))


def test_a_full_disk(backend: Backend):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(ArtefactError, match=r"cannot write /dev/full/a\.st"):
        blip_of(backend).save("/dev/full/a.st")
