"""Ensembles: ASE's dynamics with its defaults mended where they sample something else."""

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms
    from ase.md.langevin import Langevin
    from ase.md.md import MolecularDynamics

THERMOSTAT_TIME, BAROSTAT_TIME, FRICTION = 100.0, 1000.0, 0.01  # fs, fs, 1/fs


class MDEnsemble(StrEnum):
    """The ensembles: NVT by Langevin or Bussi, NVE, and NPT with a fixed shape of the cell."""

    langevin = "langevin"
    nve = "nve"
    bussi = "bussi"
    npt = "npt"


def make_dynamics(
    ensemble: MDEnsemble,
    atoms: "Atoms",
    *,
    timestep: float,
    temperature: float,
    friction: float,
    thermostat_time: float,
    barostat_time: float,
    pressure: float,
    rng: Any,
) -> "MolecularDynamics":
    """The dynamics of an ensemble.

    Args:
        ensemble: The ensemble.
        atoms: Structure with velocities and a calculator.
        timestep: Time step, fs.
        temperature: Temperature of the thermostat, K.
        friction: Friction of the Langevin thermostat, 1/fs.
        thermostat_time: Time constant of the thermostat of Bussi and of NPT, fs.
        barostat_time: Time constant of the barostat of NPT, fs.
        pressure: Pressure of NPT, GPa.
        rng: Generator of the noise.

    Raises:
        ValueError: The structure cannot be in that ensemble.
    """
    from ase import units
    from ase.md.verlet import VelocityVerlet

    dt = timestep * units.fs
    match ensemble:
        case MDEnsemble.langevin:
            return langevin(atoms, timestep=timestep, temperature=temperature, friction=friction, rng=rng)
        case MDEnsemble.nve:
            return VelocityVerlet(atoms, dt)
        case MDEnsemble.bussi:
            return _bussi(atoms, dt, temperature, thermostat_time * units.fs, rng)
        case MDEnsemble.npt:
            return _npt(atoms, dt, temperature, thermostat_time, barostat_time, pressure)


def langevin(atoms: "Atoms", *, timestep: float, temperature: float, friction: float, rng: Any) -> "Langevin":
    """Langevin dynamics: `timestep` in fs, `temperature` in K, `friction` in 1/fs, `rng` for the noise."""
    from ase import units
    from ase.md.langevin import Langevin

    # With `fixcm` the centre of mass would stand still and small systems be sampled at a wrong temperature.
    options = {"temperature_K": temperature, "friction": friction / units.fs, "fixcm": False, "rng": rng}
    return Langevin(atoms, timestep * units.fs, **options)


def set_temperature(dynamics: "MolecularDynamics", temperature: float) -> None:
    """Sets the temperature of a Langevin or Bussi thermostat, K."""
    from ase import units
    from ase.md.bussi import Bussi
    from ase.md.langevin import Langevin

    if isinstance(dynamics, Bussi):
        dynamics.temp = units.kB * temperature
        dynamics.target_kinetic_energy = 0.5 * dynamics.temp * dynamics.ndof
    else:
        assert isinstance(dynamics, Langevin)
        dynamics.set_temperature(temperature_K=temperature)


def _bussi(atoms: "Atoms", dt: float, temperature: float, time: float, rng: Any) -> "MolecularDynamics":
    from ase.md.bussi import Bussi

    if not atoms.get_momenta().any():
        raise ValueError(
            "Bussi's thermostat scales velocities, but all of them are zero at the start. Give a --temperature above 0 "
            "and a START without velocities, or take --ensemble langevin."
        )
    dynamics = Bussi(atoms, dt, temperature_K=temperature, taut=time, rng=rng)
    # ASE also counts the centre of mass and the rotation, which never get any heat: the other degrees of freedom would
    # be too hot, in a small molecule by a third.
    dynamics.ndof = _n_heated(atoms)
    set_temperature(dynamics, temperature)
    return dynamics


def _n_heated(atoms: "Atoms") -> int:
    """Number of degrees of freedom that share energy: without translation and rotation if these are at rest."""
    import numpy as np

    n_heated = atoms.get_number_of_degrees_of_freedom()
    if atoms.constraints:
        return n_heated
    momenta = atoms.get_momenta()
    if np.linalg.norm(momenta.sum(axis=0)) <= 1e-5 * np.linalg.norm(momenta, axis=1).sum():
        n_heated -= 3
    arms = atoms.positions - atoms.get_center_of_mass()
    each = np.cross(arms, momenta)
    if not atoms.pbc.any() and np.linalg.norm(each.sum(axis=0)) <= 1e-5 * np.linalg.norm(each, axis=1).sum():
        n_heated -= (0, 2, 3, 3)[np.linalg.matrix_rank(arms, tol=1e-3)]  # of a point, a line, a plane, a body
    return max(1, n_heated)


def _npt(
    atoms: "Atoms", dt: float, temperature: float, thermostat_time: float, barostat_time: float, pressure: float
) -> "MolecularDynamics":
    from ase import units
    from ase.md.nose_hoover_chain import IsotropicMTKNPT

    if not atoms.pbc.all():
        raise ValueError(
            "--ensemble npt changes the volume of a cell, but START is not periodic along all three vectors. Take "
            "langevin, bussi or nve, or a START with a periodic cell."
        )
    if atoms.constraints:
        raise ValueError(
            "--ensemble npt of ASE does not support constraints, but START has some. Take langevin, bussi or nve, or a "
            "START without them."
        )
    if not math.isfinite(pressure):
        raise ValueError(f"--pressure is a number in GPa, not {pressure:g}.")
    if not temperature > 0:
        raise ValueError(f"--ensemble npt needs a --temperature above 0 K, not {temperature:g} K.")
    assert atoms.calc is not None
    if "stress" not in atoms.calc.implemented_properties:
        raise ValueError("--ensemble npt needs the stress, which this potential does not give. Take langevin or bussi.")
    return IsotropicMTKNPT(
        atoms,
        dt,
        temperature_K=temperature,
        pressure_au=pressure * units.GPa,
        tdamp=thermostat_time * units.fs,
        pdamp=barostat_time * units.fs,
    )


def check_restartable(dynamics: "MolecularDynamics") -> None:
    """Refuses dynamics that could not go on as if nothing had happened.

    Raises:
        ValueError: Its random numbers are those of the whole process, or it may remember more than `inner_variables`.
    """
    import numpy as np
    from ase.md.andersen import Andersen
    from ase.md.bussi import Bussi
    from ase.md.langevin import Langevin
    from ase.md.nose_hoover_chain import IsotropicMTKNPT
    from ase.md.nvtberendsen import NVTBerendsen
    from ase.md.verlet import VelocityVerlet

    known = (Andersen, Bussi, IsotropicMTKNPT, Langevin, NVTBerendsen, VelocityVerlet)
    if type(dynamics) not in known:
        raise ValueError(
            f"a run of {type(dynamics).__name__} cannot go on later: what it remembers beside the structure is not "
            f"known. Use one of {', '.join(sorted(cls.__name__ for cls in known))}."
        )
    rng = getattr(dynamics, "rng", None)
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise ValueError(
            "the random numbers of these dynamics are those of the whole process, so that no run could go on with "
            f"them. Give {type(dynamics).__name__} rng=np.random.default_rng(0)."
        )


def inner_variables(dynamics: "MolecularDynamics") -> dict[str, Any]:
    """What dynamics remember beside the structure, as JSON values: random numbers, thermostat and barostat."""
    return {name: _plain(holder, attribute) for name, holder, attribute in _inner(dynamics)} | _noise(dynamics)


def set_inner_variables(dynamics: "MolecularDynamics", values: dict[str, Any]) -> None:
    """Sets what `inner_variables` gave; those of another kind of thermostat or barostat begin anew."""
    import numpy as np
    from ase import units
    from ase.md.bussi import Bussi

    inner = list(_inner(dynamics))
    if {name for name, _, _ in inner} == values.keys() - {"rng"}:
        for name, holder, attribute in inner:
            value = values[name]
            setattr(holder, attribute, np.array(value) if isinstance(value, list) else value)
    if "rng" in values and _noise(dynamics):
        dynamics.rng.bit_generator.state = values["rng"]  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(dynamics, Bussi):
        set_temperature(dynamics, dynamics.temp / units.kB)  # with its number of degrees of freedom


def _noise(dynamics: "MolecularDynamics") -> dict[str, Any]:
    rng = getattr(dynamics, "rng", None)
    return {} if rng is None else {"rng": rng.bit_generator.state}


def _inner(dynamics: "MolecularDynamics") -> "Iterator[tuple[str, Any, str]]":
    """Name, holder and attribute of each inner variable."""
    from ase.md.bussi import Bussi
    from ase.md.nose_hoover_chain import IsotropicMTKNPT

    if isinstance(dynamics, Bussi):
        yield "ndof", dynamics, "ndof"  # counted from the first velocities
    if isinstance(dynamics, IsotropicMTKNPT):
        yield from ((name, dynamics, name) for name in ("_cell0", "_volume0", "_eps", "_p_eps"))
        yield from ((name, dynamics._thermostat, name) for name in ("_eta", "_p_eta"))
        yield from ((name, dynamics._barostat, name) for name in ("_xi", "_p_xi"))


def _plain(holder: Any, attribute: str) -> Any:
    value = getattr(holder, attribute)
    return value.tolist() if hasattr(value, "tolist") else value
