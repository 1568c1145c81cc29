"""The Bayesian last layer keeps the contract of a method, for conservative and for direct potentials."""

import pytest
import torch

from ase_uq.communicator import Communicator
from ase_uq.methods.bll import BLL
from ase_uq.methods.committee import Committee
from ase_uq.methods.confidence import Confidence
from ase_uq.methods.gmm import GMM
from ase_uq.methods.kernel import Kernel
from ase_uq.methods.knn import KNN
from ase_uq.methods.mahalanobis import Mahalanobis
from ase_uq.methods.ntk import NTK
from ase_uq.methods.pdrum import PDRUM
from ase_uq.methods.pops import POPS
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import MethodContract, labelled_frames, on_ranks

from .builders import ToyCommittee, ToyWithConfidence


class TestBLL(MethodContract):
    # Standardised features with a ridge of 1e-4 have a condition number of about 1e5.
    tolerance = 1e-10

    def make_method(self):
        return BLL(ridge=1e-4)


class TestBLLDefault(MethodContract):
    # The ridge of 1e-9 makes a condition number of 1e10: digits of directions that no training frame explored are
    # lost to rounding, and the random test structures look there.
    tolerance = 1e-5

    def make_method(self):
        return BLL()


class TestBLLLastLayer(TestBLL):
    def make_method(self):
        return BLL(features="last_layer", ridge=1e-4)


@pytest.mark.filterwarnings("ignore:bll. the exact posterior:ase_uq.errors.UQWarning")
class TestBLLExact(MethodContract):
    """The posterior of energies and forces together, whose precisions are found by iteration."""

    tolerance = 1e-5

    def make_method(self):
        return BLL(conservative="exact", ridge=1e-4)

    def make_frames(self):
        return labelled_frames(10, seed=1)  # every weight takes a backward pass


class TestBLLDirect(TestBLL):
    direct = True


class TestMahalanobis(MethodContract):
    def make_method(self):
        return Mahalanobis(ridge=1e-4)


class TestMahalanobisDefault(MethodContract):
    tolerance = 1e-5  # the condition number of its ridge, as for BLL

    def make_method(self):
        return Mahalanobis()


class TestKNN(MethodContract):
    def make_method(self):
        return KNN()


class TestKNNSampled(MethodContract):
    """A sample depends on the numbers of the frames, so not on batches and ranks, but on their order."""

    test_batches_of_any_size_and_order_give_the_same_head = None
    # Atoms out of the sample are not in the mean over it.
    test_distance_is_one_on_average_over_the_fitted_atoms = None

    def make_method(self):
        return KNN(rows=20)


class TestGMM(MethodContract):
    # Principal components of small variance magnify the rounding of the features, and EM iterates on them.
    tolerance = 1e-8

    def make_method(self):
        return GMM(dimensions=6, components=6)


class TestCommittee(MethodContract):
    def make_calculator(self):
        return ToyCommittee()

    def make_method(self):
        return Committee()

    def make_frames(self):
        return labelled_frames(24, seed=1, cell=6.0)  # the toy's molecules have a stress of zero, all members agree


class TestConfidence(MethodContract):
    def make_calculator(self):
        return ToyWithConfidence()

    def make_method(self):
        return Confidence()


class TestPOPS(MethodContract):
    tolerance = 1e-9  # the condition number 1e5 twice

    def make_method(self):
        return POPS(ridge=1e-4)


class TestPOPSDefault(MethodContract):
    tolerance = 1e-5  # the condition number of its ridge, as for BLL

    def make_method(self):
        return POPS()


class TestPOPSDirect(TestPOPS):
    direct = True


class TestKernelNoisy(MethodContract):
    def make_method(self):
        return Kernel(kernel="linear", noise=1e-3)


class TestKernelLinear(MethodContract):
    tolerance = 1e-7  # a noise of 1e-4 for 200 rows: a condition number of about 1e6

    def make_method(self):
        return Kernel(kernel="linear")


class TestKernelOfSums(TestKernelLinear):
    def make_method(self):
        return Kernel(kernel="linear", features="last_layer", normalisation="global", pooling="sum")


class TestKernelCosine(TestKernelLinear):
    def make_method(self):
        return Kernel(kernel="linear", normalisation="cosine")


class TestKernel(TestKernelLinear):
    def make_method(self):
        return Kernel()


class TestKernelRBFSampled(TestKernelLinear):
    """A sample depends on the numbers of the frames, so not on batches and ranks, but on their order."""

    test_batches_of_any_size_and_order_give_the_same_head = None
    # Atoms out of the sample are in the mean by those in it.
    test_distance_is_one_on_average_over_the_fitted_atoms = None

    def make_method(self):
        return Kernel(kernel="rbf", landmarks=10)


class TestNTK(MethodContract):
    tolerance = 1e-7  # the condition number of its noise, as for the kernel

    def make_method(self):
        return NTK(tangents=2)

    def make_frames(self):
        return labelled_frames(12, seed=1)  # every atom takes a backward pass


class TestNTKSketched(TestNTK):
    def make_method(self):
        return NTK(tangents=2, size=24)


class TestNTKDirect(TestNTK):
    direct = True

    def make_method(self):
        return NTK(tangents=2, size=48)  # the direct head has more parameters than the default keeps


class TestPDRUM(MethodContract):
    """Training multiplies rounding: what may differ is whether the rows, which are kept in float32, are the same."""

    # The order of the frames decides which fold they are in.
    test_batches_of_any_size_and_order_give_the_same_head = None

    def make_method(self):
        return PDRUM(folds=2, training=Training(hidden=(16,), max_epochs=6))


class TestPDRUMLog(TestPDRUM):
    def make_method(self):
        return PDRUM(target="log", folds=2, training=Training(hidden=(16,), max_epochs=6))


class TestPDRUMQuantile(TestPDRUM):
    def make_method(self):
        return PDRUM(target="quantile", folds=2, training=Training(hidden=(16,), max_epochs=6))


class TestPDRUMDiff(TestPDRUM):
    # A prediction of what the error is on average may be small anywhere.
    test_uncertainty_is_larger_far_from_the_training_frames = None

    def make_method(self):
        return PDRUM("diff", folds=2, training=Training(hidden=(16,), max_epochs=6))


@pytest.mark.filterwarnings("ignore:diff_invariant predicts forces:ase_uq.errors.UQWarning")
class TestPDRUMDiffInvariant(TestPDRUMDiff):
    def make_method(self):
        return PDRUM("diff_invariant", folds=2, training=Training(hidden=(16,), max_epochs=6))


class TestPDRUMDiffConservative(TestPDRUMDiff):
    def make_method(self):
        return PDRUM("diff_conservative", folds=2, training=Training(hidden=(16,), max_epochs=6))

    def make_frames(self):
        return labelled_frames(10, seed=1)  # every feature takes a backward pass


def test_threads_stand_for_ranks():
    def run(ranks: Communicator) -> tuple[int, int, list[float]]:
        return ranks.rank, ranks.size, ranks.sum({"x": torch.tensor([1.0, ranks.rank])})["x"].tolist()

    assert on_ranks(3, run) == [(rank, 3, [3.0, 3.0]) for rank in range(3)]


def test_an_error_on_one_rank_ends_all():
    def run(ranks: Communicator) -> None:
        if ranks.rank == 1:
            raise ZeroDivisionError("rank one failed")
        ranks.sum({"x": torch.zeros(1)})

    with pytest.raises(ZeroDivisionError, match="rank one failed"):
        on_ranks(3, run)


def test_ranks_that_disagree_are_found():
    with pytest.raises(ValueError, match="different statistics"):
        on_ranks(2, lambda ranks: ranks.sum({"x": torch.zeros(ranks.rank + 1)}))
