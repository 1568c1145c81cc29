"""Figures: each function takes data, draws into the given `Axes` or a new figure, and returns the `Axes`.

ax = plots.error_against_uncertainty(errors, uncertainties)
ax.figure.savefig("errors.png", dpi=200)
"""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike
from scipy.special import gammaincinv, ndtri

from ase_uq import metrics
from ase_uq.report.axes import BLUE, GREY, ORANGE, RED, Axes, axes_of, clipped, equal, faint, largest_of, log_ticks, plt
from ase_uq.report.balls import balls, finite_part

# Only now: `axes` says what to install where matplotlib is missing.
# isort: split
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle

# From certain to uncertain, increasingly dark, so that the scale also works in grey.
UNCERTAINTY_COLOURS = ("#DCE3E8", ORANGE, RED, "#8E1B00")
_COLOUR_MAP = LinearSegmentedColormap.from_list("uncertainty", UNCERTAINTY_COLOURS)
_UNCERTAINTY = "force uncertainty (eV/Å)"
_LEGEND_INCHES = 1.5  # width of a legend entry as long as "predicted uncertainty"
_FEW = 300  # a line through as many frames also has points


def run(
    time: ArrayLike,
    readings: ArrayLike,
    *,
    flag: float | None = None,
    halt: float | None = None,
    errors: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    log: bool = False,
    x_label: str = "time (fs)",
    ax: Axes | None = None,
) -> Axes:
    """Uncertainty along a run, with its thresholds, flagged frames and true errors.

    Args:
        time: (n,) times, fs, or the quantity that `x_label` names.
        readings: (n,) force uncertainty of each step, eV/Å; values that are not finite leave a gap.
        flag: Threshold, eV/Å; readings at or above it are marked.
        halt: Threshold, eV/Å.
        errors: (n,) true error of the same kind as the readings, eV/Å; NaN where it is not known.
        temperature: (n,) temperatures, K, on a separate axis at the right.
        log: Whether the axis of uncertainties and errors is logarithmic.
        x_label: Label of the horizontal axis, if `time` is something else, such as the number of the frame.
        ax: Axes to draw into; a new figure by default.

    Returns:
        The axes of the uncertainty; those of the temperature are the next in `ax.figure.axes`.

    Raises:
        ValueError: Two sequences have different lengths.
    """
    time, readings = equal(time=time, readings=readings)
    readings = np.where(np.isfinite(readings), readings, np.nan)
    ax = axes_of(ax, (6.4, 3.4))
    handles = []
    if temperature is not None:
        _, kelvin = equal(time=time, temperature=temperature)
        right = ax.twinx()
        handles += right.plot(time, kelvin, color=GREY, lw=0.8, alpha=0.45, label="temperature")
        right.set(ylabel="temperature (K)", ylim=(0, 1.08 * np.nanmax(kelvin)))
        right.spines["top"].set_visible(False)
        right.tick_params(colors=GREY)
        right.yaxis.label.set_color(GREY)
        # The uncertainty is the subject, so it is drawn in front.
        ax.set_zorder(right.get_zorder() + 1)
        ax.patch.set_visible(False)
    # A frame between two gaps gives no line, so if there are few frames, they are also drawn as points.
    points = {"marker": ".", "ms": 4} if len(time) <= _FEW else {}
    handles += ax.plot(time, readings, color=BLUE, lw=1.3, label="predicted uncertainty", zorder=2, **points)
    if flag is not None:
        above = readings >= flag
        if above.any():
            handles += ax.plot(time[above], readings[above], "o", ms=2, color=ORANGE, label="flagged frame")
    for name, level, color in (("flag", flag, ORANGE), ("halt", halt, RED)):
        if level is not None:
            # In front of the readings, which would hide the line if there are many.
            handles.append(ax.axhline(level, color=color, lw=1, ls="--", zorder=2.5, label=f"{name} {level:.3g}"))
    if errors is not None:
        _, errors = equal(time=time, errors=errors)
        shown = np.isfinite(errors)
        style = {"ms": 4.5, "mfc": "white", "mec": "black", "mew": 0.9}
        handles += ax.plot(time[shown], errors[shown], "D", label="true error", **style)
    ax.set(xlabel=x_label, ylabel="force uncertainty, error (eV/Å)" if errors is not None else _UNCERTAINTY)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    # The legend stands above the axes, because a run that heats up fills them.
    figure = ax.get_figure(root=True)
    assert figure is not None
    columns = max(1, int(figure.get_figwidth() * ax.get_position().width / _LEGEND_INCHES))
    ax.legend(handles=handles, frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def gamma_along(time: ArrayLike, gamma: ArrayLike, *, x_label: str = "time (fs)", ax: Axes | None = None) -> Axes:
    """The extrapolation grade along a run, with the edge of the calibration data at 1.

    Args:
        time: (n,) times, fs, or the quantity that `x_label` names.
        gamma: (n,) largest γ of each frame; values that are not finite leave a gap.
        x_label: Label of the horizontal axis, if `time` is something else, such as the number of the frame.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: Two sequences have different lengths.
    """
    time, gamma = equal(time=time, gamma=gamma)
    gamma = np.where(np.isfinite(gamma), gamma, np.nan)
    ax = axes_of(ax, (6.4, 2.4))
    points = {"marker": ".", "ms": 4} if len(time) <= _FEW else {}
    ax.plot(time, gamma, color=BLUE, lw=1.3, label="largest γ", **points)
    ax.axhline(1, color=ORANGE, lw=1, ls="--", label="edge of the calibration data")
    ax.set(xlabel=x_label, ylabel="γ of the frame")
    if largest_of(gamma) > 20 and np.nanmin(gamma) > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def parity(
    reference: ArrayLike,
    predicted: ArrayLike,
    *,
    quantity: str = "force component",
    unit: str = "eV/Å",
    ax: Axes | None = None,
) -> Axes:
    """Predicted values against reference values, on equal axes with their diagonal.

    Args:
        reference: Reference values, of any shape.
        predicted: Predicted values of the same number.
        quantity: What they are, for the labels of the axes.
        unit: Their unit.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: There are not as many values of both, or no pair is finite.
    """
    reference, predicted = equal(reference=reference, predicted=predicted)
    finite = np.isfinite(reference) & np.isfinite(predicted)
    reference, predicted = reference[finite], predicted[finite]
    if not len(reference):
        raise ValueError("no reference and predicted value are both finite: there is nothing to draw.")
    ax = axes_of(ax, (4.2, 4.2))
    both = np.concatenate([reference, predicted])
    room = 0.05 * np.ptp(both) or 1.0
    ends = (both.min() - room, both.max() + room)
    ax.plot(ends, ends, color=GREY, lw=0.9, zorder=1)
    ax.plot(reference, predicted, ".", ms=4, mew=0, color=BLUE, alpha=faint(len(reference)), rasterized=True, zorder=2)
    rmse = np.sqrt(np.mean((predicted - reference) ** 2))
    ax.text(0.97, 0.04, f"RMSE {rmse:.3g} {unit}", transform=ax.transAxes, ha="right", size=8)
    ax.set(xlabel=f"reference {quantity} ({unit})", ylabel=f"predicted {quantity} ({unit})")
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.locator_params(nbins=4)
    return ax


def error_against_uncertainty(
    errors: ArrayLike, uncertainties: ArrayLike, *, components: int = 3, unit: str = "eV/Å", ax: Axes | None = None
) -> Axes:
    """True errors against predicted uncertainties on logarithmic axes, with bands for calibrated uncertainties.

    The bands contain 68 and 95 % of the errors if these are Gaussian with the predicted standard deviations. Their
    edges are quantiles of ‖e‖/ε, which is distributed as χ/√components. The line with markers is the root mean square
    error in bins of equal count; if calibrated, it lies on the diagonal.

    Args:
        errors: (n,) ‖F_ref - F‖ of atoms, or |error| of scalars.
        uncertainties: (n,) ε = sqrt(Σ_c σ_c²) of the same atoms or scalars.
        components: Number of components of an error: 3 for force vectors, 1 for scalars.
        unit: Unit of errors and uncertainties.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: The lengths differ, or no error and uncertainty are both positive and finite.
    """
    errors, uncertainties = equal(errors=np.abs(np.asarray(errors, float)), uncertainties=uncertainties)
    usable = (errors > 0) & (uncertainties > 0) & np.isfinite(errors) & np.isfinite(uncertainties)
    errors, uncertainties = errors[usable], uncertainties[usable]
    if not len(errors):
        raise ValueError("no error and uncertainty are both positive and finite: there is nothing to draw.")
    ax = axes_of(ax, (4.6, 4.2))
    ax.set(xscale="log", yscale="log")
    low, high = uncertainties.min() / 1.2, uncertainties.max() * 1.2
    line = np.array([low, high])
    for level, alpha in ((0.95, 0.12), (0.68, 0.22)):
        below, above = (
            np.sqrt(2 * gammaincinv(components / 2, q) / components) for q in (0.5 - level / 2, 0.5 + level / 2)
        )
        ax.fill_between(
            line, below * line, above * line, color=BLUE, alpha=alpha, lw=0, label=f"{level:.0%}, calibrated"
        )
    ax.plot(line, line, color="black", lw=0.9)
    ax.plot(uncertainties, errors, ".", ms=3, mew=0, color="black", alpha=faint(len(errors)), rasterized=True, zorder=2)
    bins = np.array_split(np.argsort(uncertainties), int(np.clip(len(errors) // 20, 1, 12)))
    rms = np.array([[np.sqrt(np.mean(values[chosen] ** 2)) for values in (uncertainties, errors)] for chosen in bins])
    ax.plot(*rms.T, "o-", color=RED, ms=4, lw=1.2, label="root mean square in bins", zorder=3)
    correlation = metrics.spearman(errors, uncertainties)
    ax.text(0.97, 0.04, f"Spearman {correlation:.2f}", transform=ax.transAxes, ha="right", size=8)
    ax.set(xlabel=f"predicted uncertainty ({unit})", ylabel=f"true error ({unit})", xlim=(low, high))
    ax.set_ylim(max(float(np.quantile(errors, 0.002)), errors.max() / 1e4), errors.max() * 1.5)
    log_ticks(ax)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def errors_side_by_side(
    samples: Mapping[str, tuple[ArrayLike, ArrayLike]], *, components: int = 3, unit: str = "eV/Å"
) -> list[Axes]:
    """`error_against_uncertainty` of several methods in one figure, on the same axes.

    Args:
        samples: Errors and uncertainties by method.
        components: Number of components of an error: 3 for force vectors, 1 for scalars.
        unit: Unit of errors and uncertainties.

    Returns:
        The axes of each method, from left to right.

    Raises:
        ValueError: There is no method, or as in `error_against_uncertainty`.
    """
    if not samples:
        raise ValueError("there is no method to draw; give the errors and uncertainties of at least one.")
    _, grid = plt.subplots(1, len(samples), figsize=(4.2 * len(samples), 4.2), layout="constrained", squeeze=False)
    panels = list(grid[0])
    for ax, (method, (errors, uncertainties)) in zip(panels, samples.items(), strict=True):
        error_against_uncertainty(errors, uncertainties, components=components, unit=unit, ax=ax)
        ax.set_title(method, fontsize=10)
    ends = np.array([(*ax.get_xlim(), *ax.get_ylim()) for ax in panels])
    for ax in panels:
        ax.set(xlim=(ends[:, 0].min(), ends[:, 1].max()), ylim=(ends[:, 2].min(), ends[:, 3].max()))
        ax.label_outer()
    return panels


def reliability(residuals: ArrayLike, std: ArrayLike, *, label: str = "", ax: Axes | None = None) -> Axes:
    """Share of components inside the central interval of each level, against that level.

    Below the diagonal the model is too sure of itself, above it too careful.

    Args:
        residuals: Array of reference - prediction, of any shape.
        std: Standard deviations of the same shape, or one for all.
        label: Name of the curve, for example "before calibration".
        ax: Axes to draw into, which several curves may share; a new figure by default.
    """
    levels = np.linspace(0, 1, 101)
    zeros = np.zeros(np.shape(residuals))
    area = metrics.miscalibration_area(residuals, zeros, std)
    z = np.abs(np.asarray(residuals, float) / np.asarray(std, float))
    observed = np.searchsorted(np.sort(z, axis=None), ndtri(0.5 + levels / 2), side="right") / z.size
    is_new = ax is None or not ax.lines
    ax = axes_of(ax, (4.2, 4.0))
    if is_new:
        ax.plot([0, 1], [0, 1], color="black", lw=0.9, ls="--")
        ax.text(0.97, 0.04, "too sure", ha="right", size=8, color=GREY)
        ax.text(0.03, 0.96, "too careful", va="top", size=8, color=GREY)
    (curve,) = ax.plot(levels, observed, lw=1.6, label=f"{label or 'model'}, area {area:.3f}")
    ax.fill_between(levels, levels, observed, color=curve.get_color(), alpha=0.12, lw=0)
    ax.set(xlabel="expected fraction", ylabel="observed fraction", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.07))
    return ax


def latent_map(
    reference: Mapping[str, ArrayLike],
    scored: ArrayLike,
    readings: ArrayLike,
    *,
    explained: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scored frames among the frames that the uncertainty model knows, in the plane of two principal components.

    Args:
        reference: (n, 2) coordinates of known frames by name, such as "training".
        scored: (n, 2) coordinates of scored frames, which are coloured by their readings.
        readings: (n,) readings, eV/Å; those that are not finite get the darkest colour.
        explained: (2,) share of the variance along each component.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: There are not as many points as readings.
    """
    points, readings = np.asarray(scored, float).reshape(-1, 2), np.asarray(readings, float).ravel()
    if len(points) != len(readings):
        raise ValueError(f"scored has {len(points)} points, readings {len(readings)}; they must have the same length.")
    ax = axes_of(ax, (5.2, 4.2))
    marks = cycle(((BLUE, "o"), ("black", "x"), (GREY, "^")))
    for (name, known), (color, marker) in zip(reference.items(), marks, strict=False):
        known = np.asarray(known, float).reshape(-1, 2)
        ax.scatter(*known.T, s=13, marker=marker, c=color, lw=0.7, alpha=0.35, label=f"{name} ({len(known)})", zorder=2)
    top = largest_of(readings)
    order = np.argsort(np.nan_to_num(readings, nan=np.inf))
    shown = ax.scatter(
        *points[order].T,
        s=20,
        c=clipped(readings[order], top),
        cmap=_COLOUR_MAP,
        vmin=0,
        vmax=top,
        ec="black",
        lw=0.3,
        label=f"scored ({len(points)})",
        zorder=3,
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(shown, ax=ax, pad=0.02, label=_UNCERTAINTY)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  (typed as a collection of spines)
    shares = ["", ""] if explained is None else [f" ({share:.0%} of the variance)" for share in np.asarray(explained)]
    ax.set(xlabel=f"component 1{shares[0]}", ylabel=f"component 2{shares[1]}", xticks=[], yticks=[])
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.2)
    return ax


def structure(atoms: Atoms, uncertainties: ArrayLike, *, largest: float | None = None, ax: Axes | None = None) -> Axes:
    """A picture of a structure, its atoms coloured by their force uncertainty; without a cell, of its flattest side.

    Args:
        atoms: Structure; bonds are drawn between atoms that touch, but not across periodic boundaries. Atoms whose
            positions are not finite are left out.
        uncertainties: (n_atoms,) force uncertainties, eV/Å; those that are not finite get the darkest colour.
        largest: Uncertainty with the darkest colour, eV/Å; the largest in the structure by default.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: There are not as many uncertainties as atoms.
    """
    values = np.asarray(uncertainties, float).ravel()
    if len(values) != len(atoms):
        raise ValueError(f"{len(values)} uncertainties for {len(atoms)} atoms; give one for each atom.")
    top = largest or largest_of(values)
    if ax is None:
        _, ax = plt.subplots(figsize=(3.6, 3.6), layout="constrained")
    atoms, indices = finite_part(atoms)
    values = values[indices]
    if not len(atoms):
        ax.text(0.5, 0.5, "no position is finite", ha="center", size=9, color=GREY, transform=ax.transAxes)
    model = balls(atoms)
    for line in model.cell:
        ax.plot(*line[:, :2].T, color=GREY, lw=0.8, zorder=1)
    colours = _COLOUR_MAP(clipped(values, top) / top)
    # Bonds and atoms are drawn from the back to the front, so that nearer ones cover farther ones.
    shapes = [(model.positions[pair, 2].min(), tuple(pair)) for pair in model.bonds]
    shapes += [(depth, (i,)) for i, depth in enumerate(model.positions[:, 2])]
    for order, (_, which) in enumerate(sorted(shapes, key=lambda shape: shape[0])):
        zorder = 2 + order / len(shapes)
        places = model.positions[list(which), :2]
        if len(which) == 2:
            ax.plot(*places.T, color="#9AA3AA", lw=5, solid_capstyle="round", zorder=zorder)
            continue
        (i,), ((x, y),) = which, places
        ax.add_patch(Circle((x, y), float(model.radii[i]), fc=colours[i], ec="#3A3F44", lw=0.9, zorder=zorder))
        if len(atoms) <= 40:
            ink = "white" if clipped(values, top)[i] > 0.55 * top else "black"
            ax.text(x, y, atoms[i].symbol, color=ink, ha="center", va="center", size=9, zorder=zorder)
    ax.set(aspect="equal")
    ax.autoscale_view()
    ax.margins(0.08)
    ax.set_axis_off()
    return ax


def know_nothing(fractions: ArrayLike, median_forces: ArrayLike, chosen: float, *, ax: Axes | None = None) -> Axes:
    """How a potential's forces grow as training frames are rattled, and where it was taken to know nothing.

    Args:
        fractions: (n,) displacements, as shares of the distance to the nearest neighbour: `FarField.fractions`.
        median_forces: (n,) median predicted force of the rattled frames, eV/Å.
        chosen: The fraction that was taken.
        ax: Axes to draw into; a new figure by default.
    """
    ax = axes_of(ax, (5, 3.4))
    x, y = equal(fractions=fractions, median_forces=median_forces)
    ax.axvline(chosen, color=ORANGE, lw=1.5, label=f"nothing known: {chosen:g}")
    ax.plot(x, y, "o-", color=BLUE, label="median predicted force")
    ax.set(xlabel="displacement / nearest distance", ylabel="force (eV/Å)", ylim=(0, 1.1 * largest_of(y)))
    ax.legend(frameon=False, fontsize=8)
    return ax
