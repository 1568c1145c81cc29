"""Runs that go forward together, so that a step of all of them is one evaluation of the potential."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, cast

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

Evaluate = Callable[[list[Atoms]], Sequence[Mapping[str, Any]]]


class Lockstep:
    """Calculators of several structures, each moved in a thread of its own; what they ask for is evaluated together.

    The evaluation is made in the thread that calls `run`, once all that still run have asked.

    Args:
        evaluate: Gives the results of each of several structures.
        n: Number of structures.
    """

    def __init__(self, evaluate: Evaluate, n: int) -> None:
        self._evaluate = evaluate
        self._asked: SimpleQueue[tuple[int, Atoms | BaseException | None]] = SimpleQueue()
        self._answers: list[SimpleQueue[Mapping[str, Any] | None]] = [SimpleQueue() for _ in range(n)]

    def calculator(self, number: int, properties: Sequence[str]) -> Calculator:
        """The calculator of one structure, with the properties that `evaluate` gives."""
        return _Asking(self, number, properties)

    def ask(self, number: int, atoms: Atoms) -> Mapping[str, Any]:
        """The results of one structure, once all others have asked as well."""
        self._asked.put((number, atoms.copy()))
        answer = self._answers[number].get()
        if answer is None:
            raise _Abandoned
        return answer

    def run[T](self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each work returns; the works move the structures, in their order.

        Raises:
            BaseException: The first error of a work or an evaluation, or an interruption; the others are abandoned.
        """
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(self._work, number, work) for number, work in enumerate(works)]
            running = len(works)
            try:
                while running:
                    waiting: dict[int, Atoms] = {}
                    while len(waiting) < running:
                        number, asked = self._asked.get()
                        if isinstance(asked, BaseException):
                            raise asked
                        if asked is None:
                            running -= 1
                        else:
                            waiting[number] = asked
                    numbers = sorted(waiting)
                    results = self._evaluate([waiting[number] for number in numbers]) if numbers else ()
                    for number, result in zip(numbers, results, strict=True):
                        self._answers[number].put(result)
            except BaseException:
                for answers in self._answers:
                    answers.put(None)
                raise
            return cast(list[T], [future.result() for future in futures])

    def _work[T](self, number: int, work: Callable[[], T]) -> T | None:
        try:
            result = work()
        except BaseException as error:
            self._asked.put((number, error))
            return None
        self._asked.put((number, None))
        return result


class _Asking(Calculator):
    def __init__(self, lockstep: Lockstep, number: int, properties: Sequence[str]) -> None:
        super().__init__()
        self.implemented_properties = list(properties)
        self._lockstep, self._number = lockstep, number

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        self.results = {}
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        self.results = dict(self._lockstep.ask(self._number, self.atoms))


class _Abandoned(Exception):
    """Ends a work whose results nobody waits for any more."""
