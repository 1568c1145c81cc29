"""Replicas in TorchSim's dynamics and relaxations, each of which halts on its own."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from ase_uq.dynamics.actions import Event, Flag
from ase_uq.dynamics.checks import Snapshot
from ase_uq.dynamics.judging import Judge, Observation, Verdict, symbols_looked_at
from ase_uq.dynamics.policy import WatchOptions, WatchPolicy, as_policy
from ase_uq.engines.torchsim.model import UncertainModel
from ase_uq.engines.torchsim.running import RunningModel, copied_rows, put_back
from ase_uq.io.results import annotated

# Name of an extra of each system: the number of its replica, wherever an autobatcher puts the system.
_REPLICA = "replica"


@dataclass(frozen=True)
class Replica:
    """The outcome of one system of a run.

    Args:
        number: Index among the systems that were given.
        formula: Chemical formula.
        step: Last judged step: the one at which it was halted, or the last of the run.
        time_fs: Simulated time of that step, fs; None in a relaxation.
        reading: Reading of that step, such as the largest force uncertainty, eV/Å; NaN without one.
        halted: Whether it was halted.
        reason: Why it was halted, in words; empty if it was not.
        n_flagged: Number of steps that reached the flag level but not the halt level.
    """

    number: int
    formula: str
    step: int = 0
    time_fs: float | None = None
    reading: float = float("nan")
    halted: bool = False
    reason: str = ""
    n_flagged: int = 0


class ReplicaMonitor:
    """Runs TorchSim's dynamics and relaxations, and halts each replica where the model is no longer reliable.

    At every step the uncertainties that the step has just computed are judged by the rules of
    `UncertaintyMonitor`, which remember each replica separately. A replica that reaches `halt` stays where it is: until
    the run ends its rows of the state, with momenta and optimiser memory, remain those of that step, the potential no
    longer evaluates it, and a reporter no longer writes it. The others go on unaffected, with the same random numbers.
    In a relaxation the halted replica also leaves the batch at the next swap, as a converged one does. Nothing is
    raised; `replicas` tells what happened. A replica whose positions or cell are no longer finite, or which the
    potential cannot evaluate, is always halted, and put back to the step before.

    To go on, give the final state to `integrate` again. Every run begins anew, so a halted replica halts again at step
    0 unless the levels were raised; `state[[r.number for r in monitor.replicas if not r.halted]]` are the others.

    Args:
        model: The model to run, which also turns criteria into numbers.
        policy: What to watch for; if None, it is made from the `options`. `indices` count within each replica.
        frames: Extended XYZ file to which every flagged or halting frame is appended, with all results and the number
            of the `replica` beside the keys that `Flag` writes.
        options: Fields of `WatchPolicy`, such as `halt` and `flag`, instead of a `policy`.

    Attributes:
        policy: What is watched for.
        replicas: The outcome of each system in the last run, in their order; empty before.

    Raises:
        ValueError: `WatchPolicy` raises it, there is nothing to watch for, the model does not give the quantity, or a
            file cannot be written.
        TypeError: A threshold or check has the wrong type, or both a policy and options are given.
    """

    def __init__(
        self,
        model: UncertainModel,
        *,
        policy: WatchPolicy | None = None,
        frames: str | os.PathLike[str] | None = None,
        **options: Unpack[WatchOptions],
    ) -> None:
        self.model = model
        self.policy = as_policy(policy, **options)
        self._judge = Judge(self.policy)
        if self.policy.rules and (key := self.policy.watched.key) not in model.predictor.results:
            raise ValueError(
                f"the model gives no {key}, so there is nothing to watch with quantity={self.policy.quantity!r}."
            )
        self._keep = None if frames is None else Flag(frames)
        self._running = RunningModel(model)
        self._judges: list[Judge] = []
        self.replicas: list[Replica] = []

    def integrate(
        self,
        system: Any,
        *,
        integrator: ts.Integrator | tuple[Callable[..., Any], Callable[..., Any]],
        trajectory_reporter: ts.TrajectoryReporter | None = None,
        **options: Any,
    ) -> Any:
        """Molecular dynamics by `ts.integrate`, judged at every step and at the first structure.

        Args:
            system: ASE Atoms, several of them, or a state; what `ts.integrate` takes.
            integrator: As for `ts.integrate`.
            trajectory_reporter: A reporter; it writes each replica up to the step at which that was halted.
            options: `n_steps`, `temperature` (K), `timestep` (ps), `autobatcher`, and others of `ts.integrate`.

        Returns:
            The final state, with all systems in the order they were given.

        Raises:
            ValueError: Levels are in the wrong order, or the calibration data cannot support a criterion.
            InputError: The potential cannot evaluate a system.
            TypeError: The reporter is a dictionary, or the integrator is unknown.
        """
        functions = self._watching(integrator, ts.INTEGRATOR_REGISTRY, "integrator")
        state = self._begin(system, 0.0)
        with self._reporting(trajectory_reporter):
            final = ts.integrate(
                state, self.model, integrator=functions, trajectory_reporter=trajectory_reporter, **options
            )
        return _without_numbers(final)

    def optimize(
        self,
        system: Any,
        *,
        optimizer: ts.Optimizer | tuple[Callable[..., Any], Callable[..., Any]],
        convergence_fn: Callable[..., Tensor] | None = None,
        trajectory_reporter: ts.TrajectoryReporter | None = None,
        **options: Any,
    ) -> Any:
        """Relaxations by `ts.optimize`, judged at every step and at the first structure.

        Args:
            system: ASE Atoms, several of them, or a state; what `ts.optimize` takes.
            optimizer: As for `ts.optimize`.
            convergence_fn: As for `ts.optimize`; None for its default, an energy change below 1 meV.
            trajectory_reporter: A reporter; it writes each replica up to the step at which that was halted.
            options: `max_steps`, `autobatcher`, `init_kwargs`, and others of `ts.optimize`.

        Returns:
            The final state, with all systems in the order they were given.

        Raises:
            ValueError: Levels are in the wrong order, the calibration data cannot support a criterion, or a rule needs
                simulated time, which a relaxation does not have.
            InputError: The potential cannot evaluate a system.
            TypeError: The reporter is a dictionary, or the optimizer is unknown.
        """
        functions = self._watching(optimizer, ts.OPTIM_REGISTRY, "optimizer")
        state = self._begin(system, None)
        done = convergence_fn or ts.generate_energy_convergence_fn(energy_tol=1e-3)

        def done_or_halted(state: Any, last_energy: Tensor) -> Tensor:
            return done(state, last_energy) | self._halted(state)

        with self._reporting(trajectory_reporter):
            final = ts.optimize(
                state,
                self.model,
                optimizer=functions,
                convergence_fn=done_or_halted,
                trajectory_reporter=trajectory_reporter,
                **options,
            )
        return _without_numbers(final)

    def _begin(self, system: Any, time: float | None) -> ts.SimState:
        """The state of a new run, with its replicas numbered; raises now if anything is wrong with one."""
        state = self.model._initial_state(system)
        frames = self.model._frames(state)
        self.model.predictor.backend.check(frames, name="system")
        settled: dict[tuple[str, ...], Judge] = {}
        self._judges, self.replicas = [], []
        for number, atoms in enumerate(frames):
            symbols = symbols_looked_at(self.policy.reduction, atoms)
            if (kind := tuple(sorted(set(symbols)))) not in settled:
                settled[kind] = copy.deepcopy(self._judge)
                # Only the calibration data of the calculator are read, and the model has them as well.
                settled[kind].settle(cast(BaseCalculator, self.model), kind, time)
            self._judges.append(copy.deepcopy(settled[kind]))
            self.replicas.append(Replica(number, atoms.get_chemical_formula(), time_fs=time))
        self._running.left_out = None
        state.system_extras[_REPLICA] = torch.arange(state.n_systems, device=state.device)
        return state

    def _watching(
        self, chosen: Any, registry: Mapping[Any, Any], what: str
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two functions of an integrator or optimiser, with a judgement after each call."""
        functions = chosen if isinstance(chosen, tuple) else registry.get(chosen, ())
        if len(functions) != 2 or not all(map(callable, functions)):
            raise TypeError(
                f"{chosen!r} is not an {what}. Give one of {', '.join(registry)}, or two functions, for the first "
                "state and for a step."
            )
        begin, move = functions

        def first(state: Any, model: ModelInterface, **options: Any) -> Any:
            self._running.left_out = None
            state = begin(state=state, model=self._running, **options)
            self._judge_systems(state, None)
            return state

        def step(state: Any, model: ModelInterface, **options: Any) -> Any:
            halted = self._running.left_out = self._halted(state)
            if halted.all():
                return state
            before = copied_rows(state)
            state = move(state=state, model=self._running, **options)
            broken = torch.zeros_like(halted)
            broken[list(self._running.broken)] = True
            put_back(state, before, halted | broken)
            self._judge_systems(state, options.get("dt", 0.0))
            return state

        return first, step

    def _halted(self, state: Any) -> Tensor:
        """(n_systems,) whether each system of a batch was halted."""
        numbers = state.system_extras[_REPLICA].tolist()
        return torch.tensor([self.replicas[number].halted for number in numbers], device=state.device)

    def _judge_systems(self, state: Any, dt: Tensor | float | None) -> None:
        """Judges the systems that the last forward pass has evaluated; `dt` is None at the first structure."""
        numbers = state.system_extras[_REPLICA].tolist()
        for system, problem in self._running.broken.items():
            replica = self._next(numbers[system], dt)
            back = "" if dt is None else "; put back to the step before"
            self._note(replica, Verdict("halt", reason=f"{problem} at step {replica.step}{back}"))
        evaluated = zip(self._running.systems, self._with_motion(state), self._running.predictions, strict=True)
        for system, atoms, prediction in evaluated:
            replica, results = self._next(numbers[system], dt), prediction.results
            contact = results.get("contact")
            snapshot = Snapshot(atoms, results["energy"], results["forces"], replica.time_fs, contact)
            values = self.policy.watched.values(atoms, results)
            verdict = self._judges[replica.number]([Observation(snapshot, values)], replica.time_fs)
            if verdict is None:
                raise ValueError(
                    f"replica {replica.number} has no {self.policy.watched.key}, which is to be watched. Without a "
                    "periodic cell there is no stress; for other quantities look at what the potential gives."
                )
            self._note(replica, verdict)
            if verdict.level != "ok" and self._keep is not None:
                self._keep(_event(replica, verdict, annotated(atoms, results, replica=replica.number)))

    def _next(self, number: int, dt: Tensor | float | None) -> Replica:
        """A replica at the step that it has just made."""
        replica = self.replicas[number]
        if dt is None:
            return replica
        step = replica.step + 1
        time = None if replica.time_fs is None else float(step * float(dt) / units.fs)
        return replace(replica, step=step, time_fs=time)

    def _note(self, replica: Replica, verdict: Verdict) -> None:
        halted = verdict.level == "halt"
        self.replicas[replica.number] = replace(
            replica,
            reading=verdict.reading,
            halted=halted,
            reason=verdict.reason if halted else "",
            n_flagged=replica.n_flagged + (verdict.level == "flag"),
        )

    def _with_motion(self, state: Any) -> Iterator[Atoms]:
        """The evaluated structures with the masses of the state and, in dynamics, its momenta."""
        ends = np.cumsum(state.n_atoms_per_system.cpu().numpy())[:-1]
        masses = np.split(state.masses.cpu().double().numpy(), ends)
        momenta = np.split(state.momenta.cpu().double().numpy(), ends) if hasattr(state, "momenta") else None
        for system, atoms in zip(self._running.systems, self._running.frames, strict=True):
            if (abs(masses[system] - atoms.get_masses()) > 1e-4).any():
                atoms.set_masses(masses[system])
            if momenta is not None:
                atoms.set_momenta(momenta[system])
            yield atoms

    @contextmanager
    def _reporting(self, reporter: ts.TrajectoryReporter | None) -> Iterator[None]:
        """Inside this context the reporter is not shown replicas that were halted before the step."""
        if reporter is None:
            yield
            return
        if not isinstance(reporter, ts.TrajectoryReporter):
            raise TypeError(
                f"trajectory_reporter is a {type(reporter).__name__}; a ts.TrajectoryReporter was expected. Make it "
                "with ts.TrajectoryReporter(filenames, ...)."
            )
        report = reporter.report
        # Of newer versions of torch_sim alone, as is the option `force` of `report`.
        report_final_frame: Any = getattr(reporter, "report_final_frame", None)

        def report_running(
            state: Any, step: int | list[int], model: Any = None, **options: Any
        ) -> list[dict[str, Tensor]]:
            left_out = self._running.left_out
            if left_out is None or not left_out.any():
                return report(state, step, model, **options)
            running = torch.nonzero(~left_out)[:, 0].tolist()
            if not running:
                return []
            trajectories = reporter.trajectories
            reporter.trajectories = [trajectories[system] for system in running if trajectories]
            try:
                steps = [step[system] for system in running] if isinstance(step, list) else step
                return report(state[running], steps, model, **options)
            finally:
                reporter.trajectories = trajectories

        def report_last_of(index: int, state: Any, step: int, model: Any = None) -> None:
            (number,) = state.system_extras[_REPLICA].tolist()
            replica = self.replicas[number]
            report_final_frame(index, state, min(step, replica.step) if replica.halted else step, model)

        # Set on the instance, where they hide the methods of whichever class the reporter has.
        hidden: dict[str, Callable[..., Any]] = {"report": report_running}
        if report_final_frame is not None:
            hidden["report_final_frame"] = report_last_of
        vars(reporter).update(hidden)
        try:
            yield
        finally:
            for name in hidden:
                del vars(reporter)[name]


def _event(replica: Replica, verdict: Verdict, frame: Atoms) -> Event:
    return Event(
        level=verdict.level,
        step=replica.step,
        time_fs=replica.time_fs,
        reading=verdict.reading,
        threshold=verdict.threshold,
        reason=verdict.reason,
        atoms=frame,
        dynamics=None,
    )


def _without_numbers(state: Any) -> Any:
    del state.system_extras[_REPLICA]
    return state
