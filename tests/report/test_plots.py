"""What the figures show, read back from their axes; how they look is for eyes."""

import importlib
import itertools
import sys

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from ase.build import molecule
from ase.data import covalent_radii
from matplotlib import pyplot as plt
from scipy import stats

from ase_uq import metrics
from ase_uq.errors import MissingDependency
from ase_uq.report import plots


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label().startswith(label)]
    return found.get_xydata()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Along a run


def test_run_shows_readings_thresholds_and_what_is_above():
    time, readings = np.arange(5) / 2, [0.1, 0.3, np.inf, 0.2, 0.6]
    ax = plots.run(time, readings, flag=0.2, halt=0.5)
    np.testing.assert_allclose(line(ax, "predicted")[:, 0], time)
    np.testing.assert_array_equal(line(ax, "predicted")[:, 1], [0.1, 0.3, np.nan, 0.2, 0.6])
    np.testing.assert_allclose(line(ax, "flagged"), [[0.5, 0.3], [1.5, 0.2], [2, 0.6]])
    for name, level in (("flag", 0.2), ("halt", 0.5)):
        np.testing.assert_allclose(line(ax, f"{name} ")[:, 1], level)
    assert labels(ax) == ["predicted uncertainty", "flagged frame", "flag 0.2", "halt 0.5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (fs)", "force uncertainty (eV/Å)")


@pytest.mark.parametrize("width", [4.6, 8.6])
def test_nothing_is_written_where_readings_would_hide_it(width):
    _, ax = plt.subplots(figsize=(width, 3.4), layout="constrained")
    rng = np.random.default_rng(0)
    time, readings = np.arange(650), rng.lognormal(size=650)
    plots.run(time, readings, flag=1.0, halt=1.02, ax=ax)
    ax.figure.canvas.draw()
    assert not ax.texts
    legend = ax.get_legend().get_window_extent()
    assert legend.y0 >= ax.get_window_extent().y1
    assert 0 <= legend.x0 < legend.x1 <= ax.figure.bbox.x1
    levels = [line for line in ax.lines if line.get_label() in ("flag 1", "halt 1.02")]
    others = [line for line in ax.lines if line not in levels]
    assert len(levels) == 2
    assert min(line.get_zorder() for line in levels) > max(line.get_zorder() for line in others)


def test_run_shows_errors_where_they_are_known():
    ax = plots.run([0, 1, 2], [0.1, 0.1, 0.1], errors=[np.nan, 0.3, np.nan])
    np.testing.assert_allclose(line(ax, "true error"), [[1, 0.3]])
    assert ax.get_ylabel() == "force uncertainty, error (eV/Å)"


def test_run_has_the_temperature_on_its_own_axis():
    ax = plots.run([0, 1, 2], [0.1, 0.1, 0.1], temperature=[300, 400, 500])
    _, right = ax.figure.axes
    np.testing.assert_allclose(line(right, "temperature")[:, 1], [300, 400, 500])
    assert right.get_ylabel() == "temperature (K)"
    assert ax.get_zorder() > right.get_zorder()
    assert labels(ax) == ["temperature", "predicted uncertainty"]


def test_run_has_another_name_for_what_is_no_time():
    assert plots.run([0, 1], [0.1, 0.2], x_label="frame").get_xlabel() == "frame"


def test_run_starts_at_zero_or_is_logarithmic():
    linear = plots.run([0, 1], [0.1, 0.2])
    assert (linear.get_yscale(), linear.get_ylim()[0]) == ("linear", 0)
    assert plots.run([0, 1], [0.1, 0.2], log=True).get_yscale() == "log"


# The extrapolation grade


def test_gamma_is_shown_with_the_edge_of_the_calibration_data():
    ax = plots.gamma_along([0, 1, 2, 3], [0.5, np.inf, 2.0, np.nan])
    np.testing.assert_array_equal(line(ax, "largest")[:, 1], [0.5, np.nan, 2.0, np.nan])
    np.testing.assert_allclose(line(ax, "edge")[:, 1], 1)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("time (fs)", "γ of the frame", "linear")
    assert plots.gamma_along([0, 1], [0.5, 500.0], x_label="frame").get_yscale() == "log"
    assert plots.gamma_along([0, 1], [0.0, 500.0]).get_yscale() == "linear"


# Parity


def test_parity_shows_every_finite_pair_on_equal_axes():
    ax = plots.parity(
        [[0.0, 1.0], [np.nan, 4.0]], [[0.1, 0.8], [2.0, np.inf]], quantity="energy per atom", unit="eV/atom"
    )
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.0, 0.1], [1.0, 0.8]])
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_aspect() == 1
    diagonal = ax.lines[0].get_xydata()
    np.testing.assert_allclose(diagonal[:, 0], diagonal[:, 1])
    assert ax.texts[0].get_text() == f"RMSE {np.sqrt(0.025):.3g} eV/atom"
    assert ax.get_xlabel() == "reference energy per atom (eV/atom)"
    assert ax.get_ylabel() == "predicted energy per atom (eV/atom)"


def test_parity_of_one_value_or_none():
    low, high = plots.parity([2.0], [2.0]).get_xlim()
    assert low < 2 < high
    with pytest.raises(ValueError, match="no reference and predicted value are both finite: there is nothing to draw"):
        plots.parity([np.nan], [1.0])


# Errors against uncertainties


@pytest.mark.parametrize("components", [1, 3])
def test_bands_hold_their_share_of_calibrated_errors(components):
    rng = np.random.default_rng(0)
    std = np.exp(rng.normal(size=20000))
    errors = np.linalg.norm(std[:, None] * rng.normal(size=(20000, components)), axis=1)
    uncertainties = std * np.sqrt(components)
    ax = plots.error_against_uncertainty(errors, uncertainties, components=components)
    for band, level in zip(ax.collections, (0.95, 0.68), strict=True):
        corners = band.get_paths()[0].vertices
        ratios = corners[:, 1] / corners[:, 0]
        low, high = ratios.min(), ratios.max()
        quantiles = stats.chi(components).ppf([0.5 - level / 2, 0.5 + level / 2]) / np.sqrt(components)
        np.testing.assert_allclose([low, high], quantiles)
        inside = (errors > low * uncertainties) & (errors < high * uncertainties)
        assert inside.mean() == pytest.approx(level, abs=0.01)
    binned = line(ax, "root mean square")
    np.testing.assert_allclose(binned[:, 1] / binned[:, 0], 1, atol=0.1)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.texts[0].get_text() == f"Spearman {metrics.spearman(errors, uncertainties):.2f}"


@pytest.mark.parametrize("decades", [0.3, 0.8, 1.4, 1.9, 2.5, 4.0])
def test_ticks_of_logarithmic_axes_are_some_and_apart(decades: float):
    uncertainties = 0.017 * np.logspace(0, decades, 50)
    ax = plots.error_against_uncertainty(uncertainties[::-1], uncertainties)
    ax.figure.canvas.draw()
    left, right = sorted(ax.get_xlim())
    ticks = ax.xaxis.get_major_ticks() + ax.xaxis.get_minor_ticks()
    labelled = [tick.label1 for tick in ticks if left <= tick.get_loc() <= right and tick.label1.get_text()]
    shown = sorted((label.get_window_extent() for label in labelled), key=lambda box: box.x0)
    assert len(shown) >= 2
    assert all(first.x1 < second.x0 for first, second in itertools.pairwise(shown))


def test_what_logarithms_cannot_show_is_left_out():
    ax = plots.error_against_uncertainty([0.0, 1.0, -2.0, 3.0], [1.0, 1.0, 2.0, np.inf], components=1)
    points = next(line for line in ax.lines if line.get_linestyle() == "None").get_xydata()
    np.testing.assert_allclose(points, [[1, 1], [2, 2]])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.error_against_uncertainty([0.0], [1.0])


def test_methods_side_by_side_share_their_axes():
    rng = np.random.default_rng(0)
    samples = {name: (scale * rng.lognormal(size=99), rng.lognormal(size=99)) for name, scale in (("a", 1), ("b", 50))}
    panels = plots.errors_side_by_side(samples, components=1, unit="eV")
    assert [ax.get_title() for ax in panels] == ["a", "b"]
    assert panels[0].figure is panels[1].figure
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for ax, (errors, uncertainties) in zip(panels, samples.values(), strict=True):
        assert ax.texts[0].get_text() == f"Spearman {metrics.spearman(errors, uncertainties):.2f}"
        points = next(line for line in ax.lines if line.get_linestyle() == "None").get_xydata()
        np.testing.assert_allclose(points, np.stack([uncertainties, errors], 1))
        assert ax.get_xlim()[0] < uncertainties.min()
        assert ax.get_ylim()[1] > errors.max()
    assert panels[0].get_ylabel() == "true error (eV)"
    assert panels[1].get_ylabel() == ""


def test_no_method_is_no_figure():
    with pytest.raises(ValueError, match="there is no method to draw"):
        plots.errors_side_by_side({})
    assert not plt.get_fignums()


# Reliability


def test_reliability_is_coverage_against_level():
    rng = np.random.default_rng(0)
    residuals = 2 * rng.normal(size=(500, 3))
    ax = plots.reliability(residuals, 1.0, label="before")
    levels, observed = line(ax, "before").T
    zeros = np.zeros_like(residuals)
    for level, fraction in list(zip(levels, observed, strict=True))[1:-1]:
        assert fraction == pytest.approx(metrics.coverage(residuals, zeros, 1.0, level=level))
    assert labels(ax) == [f"before, area {metrics.miscalibration_area(residuals, zeros, 1.0):.3f}"]


def test_several_curves_share_the_diagonal():
    residuals = np.random.default_rng(0).normal(size=100)
    ax = plots.reliability(residuals, 1.0)
    assert plots.reliability(residuals, 2.0, label="after", ax=ax) is ax
    assert len(ax.lines) == 3
    assert [text.split(",")[0] for text in labels(ax)] == ["model", "after"]


# The latent map


def test_latent_map_shows_all_groups_and_colours_the_scored():
    rng = np.random.default_rng(0)
    known, calibration, scored = (rng.normal(size=(n, 2)) for n in (30, 20, 4))
    readings = [0.3, np.nan, 0.1, 0.2]
    ax = plots.latent_map(
        {"training": known, "calibration": calibration}, scored, readings, explained=[0.6, 0.3], ax=None
    )
    first, second, third = ax.collections
    np.testing.assert_allclose(first.get_offsets(), known)
    np.testing.assert_allclose(second.get_offsets(), calibration)
    # The most uncertain are drawn last, over the others; what is not a number has the darkest colour.
    np.testing.assert_allclose(third.get_offsets(), scored[[2, 3, 0, 1]])
    np.testing.assert_allclose(third.get_array(), [0.1, 0.2, 0.3, 0.3])
    assert labels(ax) == ["training (30)", "calibration (20)", "scored (4)"]
    assert ax.get_xlabel() == "component 1 (60% of the variance)"


def test_latent_map_wants_a_reading_for_each_point():
    with pytest.raises(ValueError, match="scored has 3 points, readings 2"):
        plots.latent_map({}, np.zeros((3, 2)), [1, 2])


# Structures


def test_structure_colours_atoms_by_their_uncertainty():
    atoms = molecule("H2O")
    _, ax = plt.subplots()
    assert plots.structure(atoms, [0.1, np.nan, 0.4], largest=0.8, ax=ax) is ax
    scale = mpl.colors.LinearSegmentedColormap.from_list("", plots.UNCERTAINTY_COLOURS)
    found = {tuple(circle.get_facecolor()) for circle in ax.patches}
    assert found == {tuple(scale(fraction)) for fraction in (0.1 / 0.8, 1.0, 0.4 / 0.8)}
    assert sorted(text.get_text() for text in ax.texts) == ["H", "H", "O"]
    assert len(ax.lines) == 2  # bonds
    assert max(circle.radius for circle in ax.patches) == 0.5 * covalent_radii[8]


def test_structure_wants_an_uncertainty_for_each_atom():
    with pytest.raises(ValueError, match="2 uncertainties for 3 atoms"):
        plots.structure(molecule("H2O"), [0.1, 0.2])


# All of them


@pytest.mark.parametrize(
    "draw", [plots.run, plots.gamma_along, plots.parity, plots.error_against_uncertainty, plots.reliability]
)
def test_figures_draw_into_the_given_axes(draw):
    _, ax = plt.subplots()
    assert draw([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ax=ax) is ax
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("draw", [plots.run, plots.gamma_along, plots.parity, plots.error_against_uncertainty])
def test_lengths_must_agree(draw):
    with pytest.raises(ValueError, match=r"has 3 values, \w+ 2"):
        draw([1, 2, 3], [1, 2])


def test_without_matplotlib_the_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("axes", "plots"):
        monkeypatch.delitem(sys.modules, f"ase_uq.report.{module}")
    with pytest.raises(MissingDependency, match=r'pip install "ase-uq\[report\]"'):
        importlib.import_module("ase_uq.report.plots")


# Where nothing is known


def test_forces_of_rattled_frames_and_where_nothing_is_known():
    ax = plots.know_nothing([0.04, 0.06, 0.08], [1.0, 2.5, 2.0], 0.06)
    np.testing.assert_allclose(line(ax, "median predicted force"), [[0.04, 1.0], [0.06, 2.5], [0.08, 2.0]])
    assert line(ax, "nothing known: 0.06")[0, 0] == 0.06
    assert ax.get_xlabel() == "displacement / nearest distance"
    assert ax.get_ylabel() == "force (eV/Å)"
