"""What `--every` saves: the time of steps with uncertainties and of those without, as they were."""

from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase_uq.engines.ase.calculator import UncertainCalculator


class Stopwatch:
    """Times steps: `start` is the last observer of a run, `stop` its first.

    Args:
        calculator: Its results tell whether the step that ends had uncertainties.
    """

    def __init__(self, calculator: "UncertainCalculator") -> None:
        self._calculator = calculator
        self._started: float | None = None
        self._times: dict[bool, list[float]] = {True: [], False: []}

    def start(self) -> None:
        self._started = perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            has_uncertainties = "forces_uncertainty" in self._calculator.results
            self._times[has_uncertainties].append(perf_counter() - self._started)

    def saved(self, every: int) -> str:
        """What it came to, for people: mean times, and the share that would have been spent in addition."""
        # The first of either kind pays for what is made once.
        own, bare = self._times[True][1:], self._times[False][1:]
        if not (own and bare):
            return "too few steps to say what --every saved"
        with_uncertainties, without = sum(own) / len(own), sum(bare) / len(bare)
        n_steps = sum(map(len, self._times.values()))
        share = len(self._times[False]) / n_steps * (1 - without / with_uncertainties)
        return (
            f"steps took {1000 * with_uncertainties:.4g} ms with uncertainties and {1000 * without:.4g} ms without; "
            f"with them every {every} steps {'saved' if share >= 0 else 'cost'} {abs(share):.1%} of the time"
        )
