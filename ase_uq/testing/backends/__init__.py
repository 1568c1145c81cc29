"""`BackendContract`: laws that every backend must obey."""

from ase_uq.testing.backends.geometry import GeometryLaws
from ase_uq.testing.backends.gradients import GradientLaws
from ase_uq.testing.backends.identity import IdentityLaws
from ase_uq.testing.backends.last_layers import LastLayerLaws
from ase_uq.testing.backends.means import MeanLaws
from ase_uq.testing.backends.observing import count_forwards, process_state
from ase_uq.testing.backends.structures import standard_frames
from ase_uq.testing.backends.surroundings import SurroundingsLaws

__all__ = ["BackendContract", "PassLaws", "count_forwards", "process_state", "standard_frames"]


class PassLaws(MeanLaws, LastLayerLaws, GeometryLaws, GradientLaws):
    """What one pass gives: the laws that a variant of an architecture may break by itself, once a backend keeps all."""


class BackendContract(PassLaws, IdentityLaws, SurroundingsLaws):
    """Laws of a backend.

    Subclass it in a test file and define how the calculator is made:

        class TestMyBackend(BackendContract):
            def make_calculator(self, dtype="float64"):
                return MyCalculator(seed=0, dtype=dtype)

            def last_layer(self, calculator):
                return [calculator.model.readout.weight]

    `BackendUnderTest` lists what else may be defined; laws that do not apply are skipped.
    """
