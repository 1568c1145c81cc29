"""What `--every` saves: the measured time of steps with and without uncertainties."""

from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase_uq.engines.ase.calculator import UncertainCalculator


class Stopwatch:
    """Times steps: `start` is the last observer of a run, `stop` the first.

    Args:
        calculator: Calculator of the run; its results tell whether the step that ends had uncertainties.
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
        """The result in words: mean times, and the share of the time that was saved."""
        # The first step of either kind includes one-time costs.
        full, bare = self._times[True][1:], self._times[False][1:]
        if not (full and bare):
            return "too few steps to say what --every saved"
        with_uncertainties, without = sum(full) / len(full), sum(bare) / len(bare)
        n_steps = sum(map(len, self._times.values()))
        share = len(self._times[False]) / n_steps * (1 - without / with_uncertainties)
        return (
            f"steps took {1000 * with_uncertainties:.4g} ms with uncertainties and {1000 * without:.4g} ms without; "
            f"computing them only every {every} steps {'saved' if share >= 0 else 'cost'} {abs(share):.1%} of the time"
        )
