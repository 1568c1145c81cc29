"""What the page says, that it asks nobody, and that a browser shows it."""

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from ase.build import bulk
from ase.io import read
from matplotlib import pyplot as plt
from PIL import Image

from ase_uq import Predictor, Quantile, UncertaintyModel, embedded, load_backend, write_frames
from ase_uq.errors import ArtefactError, InputError, MissingDependency
from ase_uq.io.frames import read_frames
from ase_uq.io.results import annotated
from ase_uq.report.page import write_report

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>"""


class Elements(HTMLParser):
    """Every element with its attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.found[-1][0] if self.found else "", data))

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def visible(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    return UncertaintyModel.load(embedded.path("mace.uq.safetensors"))


@pytest.fixture(scope="module")
def predictor(model) -> Predictor:
    return Predictor(load_backend("embedded:mace"), model)


@pytest.fixture(scope="module")
def scored(predictor, tmp_path_factory) -> Path:
    """Labelled frames of two temperatures, scored by the embedded potential, through a file."""
    frames = [a for name in ("test_300K.xyz", "test_900K.xyz") for a in read(embedded.path(name), ":30")]
    predictions = predictor.predict(frames)
    path = tmp_path_factory.mktemp("scored") / "scored.xyz"
    write_frames(path, [annotated(a, p.results) for a, p in zip(frames, predictions, strict=True)])
    return path


@pytest.fixture(scope="module")
def labelled(scored, model, predictor, tmp_path_factory):
    """The full report with everything in it, and its text."""
    folder = tmp_path_factory.mktemp("report")
    report = write_report(
        folder / "report.html",
        read_frames(scored),
        model,
        flag=Quantile(0.99),
        halt=0.5,
        backend=predictor.backend,
        train=read(embedded.path("train_300K.xyz"), ":40"),
        calibration=read(embedded.path("calibration_300K.xyz"), ":30"),
        sources={"frames": "scored.xyz"},
    )
    return report, report.page.read_text("utf-8")


@pytest.fixture
def told(write, blank_pictures):
    """The same without pictures, for tests of what is said and written."""
    return write


@pytest.fixture
def write(tmp_path, model):
    def write(frames, **settings):
        report = write_report(tmp_path / "report.html", frames, model, **settings)
        return report, report.page.read_text("utf-8")

    return write


def test_numbers_are_those_of_the_frames(labelled, scored, model):
    report, text = labelled
    said = Elements(text).visible
    frames = read_frames(scored)
    norms = [np.linalg.norm(atoms.calc.results["forces_uncertainty"], axis=1) for atoms in frames]
    readings = np.array([each.max() for each in norms])
    flag = model.threshold(Quantile(0.99))
    counts = [(readings < flag).sum(), ((readings >= flag) & (readings < 0.5)).sum(), (readings >= 0.5).sum()]
    for name, count in zip(("trusted", "candidate", "failed"), counts, strict=True):
        assert re.search(rf"{name} [^:]*: {count} frames", said)
    assert f"{readings.max():.3g} eV/Å frame {readings.argmax()}" in said
    residuals = np.concatenate([a.arrays["REF_forces"] - a.calc.results["forces"] for a in frames])
    assert f"{np.sqrt(np.mean(residuals**2)):.3g} eV/Å" in said
    assert report.summary().startswith(
        f"60 frames, 540 atoms, {counts[1] + counts[2]} at or above flag, {counts[2]} at or above halt."
    )


def test_of_the_frames_in_each_band_it_says_how_many_were_wrong(told, scored):
    frames = read_frames(scored)
    readings = np.array([np.linalg.norm(a.calc.results["forces_uncertainty"], axis=1).max() for a in frames])
    residuals = [a.arrays["REF_forces"] - a.calc.results["forces"] for a in frames]
    errors = np.array([np.linalg.norm(each, axis=1).max() for each in residuals])
    del frames[0].arrays["REF_forces"]  # counts in the band, but nobody knows whether it is wrong
    flag, tolerance = np.median(readings), np.quantile(errors, 0.3)
    said = Elements(told(frames, flag=flag, tolerance=tolerance)[1]).visible
    trusted = (readings < flag) & (np.arange(60) > 0)
    n, wrong = trusted.sum(), (errors[trusted] > tolerance).sum()
    assert 0 < wrong < n
    share = f"{wrong / n:.1%}"
    assert (
        f"Of {n} trusted frames with reference forces, {wrong} ({share}) were wrong: by more than {tolerance:.3g}"
        in said
    )
    assert f"trusted {n} {wrong} ({share}) {np.median(errors[trusted]):.3g} {errors[trusted].max():.3g} " in said
    rest = (readings >= flag) & (np.arange(60) > 0)
    assert f"candidate {rest.sum()} {(errors[rest] > tolerance).sum()} (" in said
    assert "failed" not in said


def rows_of(text: str, caption: str) -> list[list[str]]:
    """The cells of a table's body, by row."""
    (table,) = [table for table in re.findall(r"<table>.*?</table>", text, re.DOTALL) if f"<caption>{caption}" in table]
    rows = re.findall(r"<tr>(.*?)</tr>", table[table.index("<tbody>") :], re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_flagged_frames_are_listed_with_number_time_reading_and_reason(told, scored):
    frames = read_frames(scored)[:6]
    for step, atoms in enumerate(frames):
        atoms.info["time_fs"] = 0.5 * step
        atoms.calc.results["forces_uncertainty"] = np.full((9, 3), 0.1 * (step + 1) / np.sqrt(3))
    frames[0].info["flag_reason"] = "contact of 0.5"
    frames[2].calc.results["forces_uncertainty"] = np.full((9, 3), np.nan)
    text = told(frames, flag=0.45, halt=0.55)[1]
    assert rows_of(text, "Flagged frames") == [
        ["0", "0", "0.1", "contact of 0.5"],
        ["2", "1", "undefined", "the reading is not a number"],
        ["4", "2", "0.5", "at or above flag"],
        ["5", "2.5", "0.6", "at or above halt"],
    ]
    for atoms in frames:
        del atoms.info["time_fs"]
    assert rows_of(told(frames, flag=0.45)[1], "Flagged frames")[0] == ["0", "0.1", "contact of 0.5"]
    assert "Flagged frames" not in told(frames[3:])[1]


def test_of_very_many_flagged_frames_those_with_the_largest_readings_are_listed(told, scored):
    frames = read_frames(scored)
    readings = [np.linalg.norm(a.calc.results["forces_uncertainty"], axis=1).max() for a in frames]
    text = told([frames[i % 60] for i in range(240)], flag=1e-9)[1]
    rows = rows_of(text, "Flagged frames")
    assert len(rows) == 200
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    least = np.argsort(readings)[:10]
    assert not {int(row[0]) % 60 for row in rows} & set(least.tolist())
    assert "40 further flagged frames with smaller readings are not listed." in Elements(text).visible


def test_gamma_and_temperature_are_shown_where_frames_have_them(told, scored):
    frames = read_frames(scored)[:5]
    for kelvin, atoms in zip((290, 300, 310, 320, 330), frames, strict=True):
        atoms.set_velocities(np.random.default_rng(0).normal(size=(9, 3)))
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(kelvin / atoms.get_temperature()))
    text = told(frames)[1]
    assert "The temperature is between 290 and 330 K." in text
    assert "Line of the largest γ of each frame over frame: median " in text
    for atoms in frames:
        atoms.set_momenta(np.zeros((9, 3)))
        del atoms.calc.results["gamma"]
        atoms.arrays.pop("gamma", None)
    text = told(frames)[1]
    assert "The temperature" not in text
    assert "largest γ" not in text


def test_captions_name_no_colours_which_a_dark_page_changes(labelled):
    page = Elements(labelled[1])
    captions = " ".join(data for tag, data in page.texts if tag == "figcaption")
    described = " ".join(image["alt"] for image in page.attributes("img"))
    assert "the line with markers lies on the diagonal" in captions
    assert not re.search(r"\b(red|blue|black|white|orange|gr[ae]y|yellow|green)\b", captions + described)


@pytest.mark.parametrize("dark", [False, True])
def test_captions_can_be_read_on_their_cards(labelled, dark):
    colours = [
        dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", labelled[1], re.DOTALL)
    ]
    light, night = colours

    def luminance(colour: str) -> float:
        channels = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        values = np.array([int(channels[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    of = light | night if dark else light
    for ink in ("ink", "quiet", "trusted", "candidate", "failed"):
        for ground in ("card", "paper"):
            dim, bright = sorted((luminance(of[ink]), luminance(of[ground])))
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)  # WCAG 2.1, level AA


def test_the_table_has_a_row_for_each_element(labelled, scored):
    said = Elements(labelled[1]).visible
    numbers = np.concatenate([atoms.numbers for atoms in read_frames(scored)])
    norms = np.concatenate([np.linalg.norm(a.calc.results["forces_uncertainty"], axis=1) for a in read_frames(scored)])
    for symbol, z in (("H", 1), ("C", 6), ("O", 8)):
        mine = norms[numbers == z]
        assert f" {symbol} {len(mine)} {np.median(mine):.3g} {np.quantile(mine, 0.99):.3g} {mine.max():.3g} " in said


def test_it_has_every_section_and_where_it_comes_from(labelled, model):
    report, text = labelled
    said = Elements(text).visible
    for title in (
        "Uncertainty along the frames",
        "Are forces and uncertainties right?",
        "By element",
        "Where the frames lie",
        "The most uncertain frames",
        "Where this comes from",
    ):
        assert title in said
    assert model.identity.fingerprint in said
    assert " ".join(model.summary().split()) in said
    assert model.threshold(Quantile(0.99)).describe() in said
    assert model.provenance["train"]["digest"] in said
    assert report.page.name == "report.html"


def test_pictures_are_files_too(labelled):
    report, _ = labelled
    names = [path.name for path in report.pictures]
    parities = ["parity_forces.png", "parity_energy_per_atom.png"]
    assert names[:7] == ["uncertainty.png", "gamma.png", *parities, "reliability.png", "errors.png", "latent_map.png"]
    assert len(names) == 13
    assert {path.parent.name for path in report.pictures} == {"report_figures"}
    for path in report.pictures:
        with Image.open(path) as image:
            assert image.width > 400
            assert len(image.convert("L").getcolors() or [0] * 9) > 8
    assert not plt.get_fignums()


def test_it_asks_nobody(labelled):
    text = labelled[1]
    page = Elements(text)
    for tag, attributes in page.found:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "data", "action", "poster", "background"):
                assert value.startswith("data:"), (tag, name, value[:60])
    assert not {"link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.found}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert "http" not in policy


def test_the_policy_allows_the_two_scripts_that_are_in_it(labelled):
    text = labelled[1]
    own = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    packed = re.search(r'id="plotly">([^<]*)<', text)
    assert packed is not None
    library = gzip.decompress(base64.b64decode(packed[1])).decode()
    assert "plotly.js v" in library[:200]
    for script in (own, library):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in text
    assert "'unsafe-inline'" not in text[text.index("script-src") : text.index("script-src") + 400].split('"')[0]


def test_every_picture_says_what_it_shows(labelled):
    page = Elements(labelled[1])
    images = page.attributes("img")
    assert len(images) == 13
    assert all(len(image["alt"]) > 30 for image in images)
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("h1")) == 1
    assert {cell["scope"] for cell in page.attributes("th")} == {"row", "col"}
    assert any(a.get("name") == "viewport" for a in page.attributes("meta"))


def test_structures_are_bounded(told):
    rng = np.random.default_rng(0)
    frames = []
    for index in range(9):
        atoms = bulk("Si", cubic=True) * ((1, 1, 1) if index else (4, 4, 4))
        std = rng.lognormal(size=(len(atoms), 1)) * np.ones(3)
        std[0] = 99
        frames.append(annotated(atoms, {"forces_uncertainty": std}))
    text = told(frames)[1]
    data = structures_of(text)
    assert len(data["structures"]) == 6
    assert [len(each["positions"]) for each in data["structures"]] == [400, 8, 8, 8, 8, 8]
    assert [len(each["cell"]) > 0 for each in data["structures"]] == [False, True, True, True, True, True]
    assert data["structures"][0]["names"][0] == "Si 0: 171 eV/Å"
    assert text.count("The 400 atoms around it are shown.") == 1
    assert len(text) < 3e6


def structures_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="structures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_what_users_wrote_is_text(told, scored):
    frames = read_frames(scored)[:3]
    for atoms in frames:
        atoms.info["flag_reason"] = EVIL
    text = told(frames, sources={EVIL: EVIL})[1]
    page = Elements(text)
    assert all(attributes.keys() <= {"id", "type"} for attributes in page.attributes("script"))
    assert len(page.attributes("script")) == 3
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert EVIL in page.visible
    assert EVIL not in text


def test_without_thresholds_labels_and_potential_there_is_less(told, scored):
    frames = read_frames(scored)[:5]
    for atoms in frames:
        del atoms.arrays["REF_forces"], atoms.info["REF_energy"]
    report, text = told(frames)
    said = Elements(text).visible
    assert "No threshold was given" in said
    for absent in ("Are forces and uncertainties right?", "Where the frames lie", "In 68 %", "Spearman"):
        assert absent not in said
    assert (report.flag, report.halt) == (None, None)
    assert "Frames within" not in said


def test_frames_have_the_number_they_had_in_the_trajectory_that_was_scored(told, scored):
    frames = [annotated(a, source_frame=i) for i, a in enumerate(read_frames(scored)) if i != 5]
    readings = {a.info["source_frame"]: a.calc.results["forces_uncertainty"] for a in frames}
    worst = max(readings, key=lambda i: np.linalg.norm(readings[i], axis=1).max())
    assert worst > 5
    report, text = told(frames)
    said = Elements(text).visible
    assert f"eV/Å frame {worst} " in said
    assert f"Frame {worst} , " in said
    assert f"Frame {worst}, C3H4O2; most uncertain is" in text
    assert f"eV/Å at frame {worst}; 0 flagged frames." in text
    assert f"frame_{worst}.png" in [path.name for path in report.pictures]
    assert "as in the trajectory that was scored, from 0; 1 of the first 60 frames is not here" in said
    assert "Frames within" not in said


def test_frames_of_another_model_are_refused(told, scored, model):
    frames = [annotated(atoms, scored_with=model.name) for atoms in read_frames(scored)[:3]]
    told(frames)
    frames[1].info["scored_with"] = "uq-another"
    with pytest.raises(
        InputError, match=rf"frame 1.* another uncertainty model \(uq-another\) .* \({model.name}\)\. Giv"
    ):
        told(frames)


def test_what_is_left_out_beside_a_worse_frame_is_said_in_whole_frames(told, scored):
    frames = read_frames(scored)
    said = Elements(told([frames[i % 60] for i in range(600)])[1]).visible
    assert "Frames within 6 frames of a worse frame are left out." in said
    said = Elements(told([frames[i % 60] for i in range(120)])[1]).visible
    assert "Frames within 1 frame of a worse frame are left out." in said


def test_atoms_that_are_nowhere_are_not_drawn_and_that_is_told(labelled, told, scored, predictor):
    frames = read_frames(scored)[:4]
    frames[1].positions[3] = np.nan
    frames[1].calc.results["forces_uncertainty"] = np.full((9, 3), np.nan)
    frames[2].positions[:] = np.inf
    frames[3].pbc, frames[3].cell = True, np.full((3, 3), np.nan)
    report, text = told(frames, backend=predictor.backend)
    said = Elements(text).visible
    assert "The positions of 1 atom are not finite: not drawn." in said
    assert "The positions of 9 atoms are not finite: not drawn." in said
    assert "Its cell is not finite: not drawn." in said
    assert "3 frames with positions that are not finite cannot be on the map." in said
    assert "Principal components of 1 scored frame among" in text
    drawn = [len(structure["positions"]) for structure in structures_of(text)["structures"]]
    assert sorted(drawn) == [0, 8, 9, 9]
    assert [each["data-structure"] for each in Elements(text).attributes("figure") if "data-structure" in each] == [
        str(number) for number, n_atoms in enumerate(drawn) if n_atoms
    ]
    structure = structures_of(text)["structures"][drawn.index(8)]
    assert [int(re.search(r" (\d+):", name)[1]) for name in structure["names"]] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert len(report.pictures) == 11


def test_what_is_not_a_number_is_told(told, scored):
    frames = read_frames(scored)[:4]
    frames[2].calc.results["forces_uncertainty"] = np.full((9, 3), np.nan)
    del frames[3].calc.results["forces_uncertainty"], frames[3].arrays["forces_uncertainty"]
    report, text = told(frames, halt=0.5)
    said = Elements(text).visible
    assert "Frames whose uncertainty is not a number: 1." in said
    assert "Frames without uncertainties, left out: 1." in said
    assert "undefined eV/Å frame 2" in said
    assert report.survey.above(0.5).tolist() == [False, False, True]
    assert None in structures_of(text)["structures"][0]["uncertainties"]


def test_one_frame_of_one_atom(write):
    atoms = annotated(bulk("Si")[:1], {"forces_uncertainty": np.full((1, 3), 0.2), "gamma": np.array([np.inf])})
    said = Elements(write([atoms], flag=0.1)[1]).visible
    assert "Uncertainty of 1 frame of Si" in said
    assert "candidate from 0.1 eV/Å: 1 frame (100.0%)" in said
    assert "1 frames" not in said


def test_time_is_shown_where_it_is_known(told, scored):
    frames = read_frames(scored)[:6]
    for step, atoms in enumerate(frames):
        atoms.info["time_fs"] = 0.5 * step
    assert "Line of the force uncertainty over time (fs)" in told(frames)[1]
    frames[3].info["time_fs"] = 0.0
    assert "Line of the force uncertainty over frame" in told(frames)[1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"flag": 0.5, "halt": 0.4}, ValueError, "flag is 0.5 eV/Å and halt is 0.4 eV/Å, so no frame lies between"),
        ({"halt": -1.0}, ValueError, "halt is -1 eV/Å; a positive force uncertainty"),
        ({"tolerance": 0.0}, ValueError, "the tolerance is 0.0 eV/Å; a positive force error was expected"),
        ({"train": []}, ValueError, "the latent map, which needs the potential"),
    ],
)
def test_bad_settings(told, scored, settings, error, message):
    with pytest.raises(error, match=message):
        told(read_frames(scored)[:2], **settings)


def test_outputs_that_cannot_be_written_are_told_before_the_work(model, tmp_path):
    def frames():
        raise AssertionError("read too early")
        yield

    with pytest.raises(ArtefactError, match=r"cannot write .*no/report.html"):
        write_report(tmp_path / "no" / "report.html", frames(), model)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file, where a folder for pictures was expected"):
        write_report(tmp_path / "report.html", frames(), model, pictures=tmp_path / "file")


def test_a_page_that_fails_leaves_the_one_before(told, scored, tmp_path):
    _, before = told(read_frames(scored)[:3])
    pictures = {path.name for path in (tmp_path / "report_figures").iterdir()}
    with pytest.raises(InputError, match="there are no frames"):
        told([])
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report_figures"}
    assert {path.name for path in (tmp_path / "report_figures").iterdir()} == pictures


def test_a_report_of_nothing_leaves_nothing(told, tmp_path):
    with pytest.raises(InputError, match="there are no frames"):
        told([])
    assert not list(tmp_path.iterdir())


def test_pictures_of_the_report_before_do_not_stay(told, scored):
    frames = read_frames(scored)
    for numbers in (range(50, 54), range(3)):
        report, _ = told([annotated(frames[i], source_frame=i) for i in numbers])
        found = {path.name for path in report.pictures[0].parent.iterdir()}
        assert found == {path.name for path in report.pictures}
        assert {name for name in found if name.startswith("frame")} == {f"frame_{i}.png" for i in numbers}


@pytest.mark.parametrize(("package", "module"), [("plotly", "viewer"), ("jinja2", "template")])
def test_without_what_it_needs_the_install_line_is_told(monkeypatch, package, module):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"ase_uq.report.{module}")
    with pytest.raises(MissingDependency, match=rf'need.? {package}, .* pip install "ase-uq\[report\]"'):
        __import__(f"ase_uq.report.{module}")


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# A virtual clock runs ahead of what draws the structures, and compositing by a GPU that there is not may hang.
BROWSE = (
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-gpu-compositing",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    # A headless browser has no pointer; with a mouse, structures turn without being asked.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
# Holds the page at a width of its own, narrower than a window can be, and says how it sits in it when its structures
# turn. It is not loaded, so not taken a picture of, before its listener has heard that.
HOLDER = """<!DOCTYPE html><body style="margin:0"><iframe src="report.html"
 style="border:0;width:{width}px;height:{height}px"></iframe><img src="{listener}" hidden><script>
const frame = document.querySelector("iframe");
const look = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images].filter((image) => !image.hidden);
  const turning = page.querySelectorAll('figure[data-turning="done"] canvas').length;
  if (turning < 6) return setTimeout(look, 100);
  fetch("{listener}", {{method: "POST", mode: "no-cors", body: JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, turning: turning,
    broken: images.filter((image) => !image.complete || !image.naturalWidth).length,
    asked: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
  }})}});
}};
frame.onload = look;
</script></body>"""


@pytest.fixture
def listener() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address that answers once it was told something, and what that was."""
    told: list[dict[str, Any]] = []
    heard = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.wait(120)
            self.answer()

        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer()
            heard.set()

        def answer(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", told
        heard.set()
        server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to look at the page with")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page(labelled, tmp_path, width, listener):
    assert BROWSER is not None
    address, told = listener
    height = 12000 if width < 600 else 6500
    shutil.copy(labelled[0].page, tmp_path / "report.html")
    (tmp_path / "holder.html").write_text(HOLDER.format(width=width, height=height, listener=address))
    common = [BROWSER, *BROWSE, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},{height}"]
    holder = f"file://{tmp_path / 'holder.html'}"
    environment = os.environ | {"HOME": str(tmp_path)}
    shot = tmp_path / "page.png"
    command = [*common, f"--screenshot={shot}", holder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    assert "Content Security Policy" not in done.stderr
    assert "Uncaught" not in done.stderr
    assert told, done.stderr[-2000:]
    (state,) = told
    assert state["width"] == width
    assert state["needed"] == width  # nothing sticks out sideways
    assert state["broken"] == 0
    assert state["asked"] == []
    assert state["turning"] >= 6
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"), int)[:, :width]
    assert pixels.shape[:2] == (height, width)
    # Balls in the colours of uncertainty, where the cards of structures are: orange is nowhere else in such an amount.
    orange = (pixels[..., 0] > 150) & (pixels[..., 2] < 60) & (pixels[..., 0] - pixels[..., 1] > 30)
    assert orange.sum() > 5000
