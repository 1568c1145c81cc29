"""Finding the backend of a calculator, building the calculator of a SPEC, and saying what is wrong with one."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read

from ase_uq import backends, embedded
from ase_uq.backends import load_backend, registry
from ase_uq.backends.registry import available_backends
from ase_uq.backends.specs import calculator_from_spec
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.errors import MissingDependency

from .builders import compiled

PLUGIN = """
from ase.calculators.emt import EMT
from ase_uq.backends.toy import ToyBackend, ToyCalculator

class PluginCalculator(EMT):
    pass

class PluginBackend(ToyBackend):
    name = "plugin"

def accepts(calculator):
    return isinstance(calculator, PluginCalculator)

def wrap(calculator):
    return PluginBackend(ToyCalculator())

def load(prefix, target, device, dtype):
    calculator = PluginCalculator()
    calculator.asked = (prefix, target, device, dtype)
    return calculator
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed third-party package with an entry point; gives the name of its module."""
    (tmp_path / "some_plugin.py").write_text(PLUGIN)
    metadata = tmp_path / "some_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ase_uq.backends]\nplugin = some_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_plugin", raising=False)
    return "some_plugin"


def test_importing_the_registry_imports_no_potential():
    code = (
        "import sys, ase_uq.backends as b; b.available_backends(); b.load_backend('toy:'); print(*sorted(sys.modules))"
    )
    folder = Path(backends.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert not {"mace", "e3nn", "orb_models", "sevenn"} & set(run.stdout.split())


def test_available_backends_are_those_whose_package_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "is_importable", lambda name: name != "orb_models")
    assert available_backends() == ("mace", "sevennet", "toy")


def test_a_backend_is_returned_as_it_is():
    backend = load_backend("toy:")
    assert isinstance(backend, ToyBackend)
    assert load_backend(backend) is backend


def test_a_subclass_of_a_known_calculator_is_known():
    class MyCalculator(ToyCalculator):
        pass

    assert load_backend(MyCalculator()).name == "toy"


def test_unknown_calculator():
    with pytest.raises(
        TypeError, match=r"no backend knows EMT \(of ase\.calculators\.emt\)\. Backends here: mace, orb"
    ):
        load_backend(EMT())


def test_device_and_dtype_go_with_a_spec():
    assert load_backend("toy:", device="cpu", dtype="float32").dtype == torch.float32
    assert load_backend("toy:", device="cpu").dtype == torch.float64
    with pytest.raises(ValueError, match="device='cpu' and dtype='' go with a SPEC; ToyCalculator already has its own"):
        load_backend(ToyCalculator(), device="cpu")


def test_toy_direct():
    calculator = calculator_from_spec("toy:direct")
    assert isinstance(calculator, ToyCalculator)
    assert calculator.potential.direct
    with pytest.raises(ValueError, match=r"there is no toy potential 'x'\. Use toy: or toy:direct"):
        load_backend("toy:x")


@pytest.mark.parametrize(
    ("available", "device", "expected"),
    [(False, "", "cpu"), (True, "", "cuda"), (True, "cpu", "cpu"), (True, "cuda:1", "cuda:1")],
)
def test_default_device(available: bool, device: str, expected: str, monkeypatch: pytest.MonkeyPatch, plugin: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * available)
    assert calculator_from_spec("plugin:", device=device).asked[2] == expected  # pyright: ignore


def test_devices_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch sees 0 cuda devices on this machine\. Use cpu"):
        load_backend("toy:", device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is 'cuda:2', but torch sees 2 cuda devices"):
        load_backend("toy:", device="cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"device is 'mps', but the statistics are in float64, which MPS lacks\. Use c"
    ):
        load_backend("toy:", device="mps")
    with pytest.raises(ValueError, match="device is 'gpu', which torch does not know"):
        load_backend("toy:", device="gpu")


def test_dtypes_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"dtype is 'half'\. Use float32 or float64"):
        load_backend("toy:", dtype="half")


@pytest.mark.parametrize(
    ("spec", "suggestion"),
    [
        ("my.model", "mace:my.model"),
        ("orb_v3_direct_20_omat", "orb:orb_v3_direct_20_omat"),
        ("7net-0", "sevennet:7net-0"),
        ("SevenNet-0_22May2024", "sevennet:SevenNet-0_22May2024"),
        ("orb-direct", "embedded:orb-direct"),
        ("mace", "embedded:mace"),
        ("my.py", "my.py:FUNCTION"),
        ("my.safetensors", "mace:my.safetensors' or 'orb:my.safetensors"),
    ],
)
def test_spec_without_a_colon(spec: str, suggestion: str):
    with pytest.raises(ValueError, match=rf"{spec!r} has no colon.*for example '{suggestion}'"):
        load_backend(spec)


@pytest.mark.parametrize("spec", ["toy:?head=a", "toy:direct?head=a"])
def test_heads_of_potentials_that_have_none(spec: str):
    with pytest.raises(ValueError, match=r"with \?head=a: potentials of toy have no heads\. Leave \?head= out"):
        load_backend(spec)


def test_a_spec_that_names_no_head():
    with pytest.raises(ValueError, match=r"'mace:x.model\?head=' names no head after \?head="):
        load_backend("mace:x.model?head=")


def test_unknown_prefix():
    with pytest.raises(
        ValueError, match=r"'maze' in 'maze:x' is neither .* Did you mean mace.*Prefixes here: embedded"
    ):
        load_backend("maze:x")


@pytest.mark.parametrize("name", ["mace", "orb-direct"])
def test_embedded_potentials(name: str):
    with compiled():
        backend = load_backend(f"embedded:{name}", device="cpu")
    atoms = read(embedded.path("malonaldehyde.xyz"))
    assert isinstance(atoms, Atoms)
    forces = backend.forward(backend.collate([atoms])).forces
    assert forces is not None
    assert 0 < float(forces.abs().max()) < 10


def test_embedded_potentials_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"this installation lacks mace\.safetensors of embedded:mace"):
        load_backend("embedded:mace")
    with pytest.raises(
        ValueError, match=r"no embedded potential 'orb-directs'\. Did you mean orb-direct.* carries mace"
    ):
        load_backend("embedded:orb-directs")


def test_function_of_a_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from ase_uq.backends.toy import ToyCalculator\n"
        "@dataclass\n"
        "class Settings:\n"
        "    seed: int = 3\n"
        "def potential(dtype='float64', device='cpu'):\n"
        "    return ToyCalculator(seed=Settings().seed, dtype=dtype, device=device)\n"
        "def headed(head):\n"
        "    return ToyCalculator(seed=int(head))\n"
        "def fixed():\n"
        "    return ToyCalculator()\n"
        "def wrong():\n"
        "    return 3\n"
    )
    path = tmp_path / "mine.py"
    calculator = calculator_from_spec(f"{path}:potential", dtype="float32", device="cpu")
    assert isinstance(calculator, ToyCalculator)
    assert calculator.potential.weights.dtype == torch.float32
    assert load_backend(f"{path}:fixed").dtype == torch.float64
    with pytest.raises(ValueError, match=r"fixed' takes no dtype, but float32 was asked for"):
        load_backend(f"{path}:fixed", dtype="float32")
    assert load_backend(f"{path}:headed?head=5").name == "toy"
    with pytest.raises(ValueError, match=r"fixed' takes no head, but 5 was asked for"):
        load_backend(f"{path}:fixed?head=5")
    with pytest.raises(ValueError, match=r"fixed' takes no device, but cpu was asked for"):
        load_backend(f"{path}:fixed", device="cpu")
    with pytest.raises(TypeError, match=r"mine\.py:wrong' returned int; an ASE calculator was expected"):
        load_backend(f"{path}:wrong")
    with pytest.raises(ValueError, match=r"there is no function 'potentail' in that module\. Did you mean potential"):
        load_backend(f"{path}:potentail")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other\.py to take a calculator from"):
        load_backend(f"{tmp_path / 'other.py'}:potential")


def test_function_of_a_module():
    assert load_backend("ase_uq.backends.toy:ToyCalculator").name == "toy"
    with pytest.raises(ValueError, match=r"'ase_uq\.nothing' in .* is neither a SPEC prefix nor an importable module"):
        load_backend("ase_uq.nothing:f")


@pytest.mark.parametrize(
    ("name", "package", "spec"),
    [("mace", "mace", "mace:x.model"), ("orb", "orb_models", "orb:x"), ("sevennet", "sevenn", "sevennet:7net-0")],
)
def test_missing_package(name: str, package: str, spec: str, monkeypatch: pytest.MonkeyPatch):
    _forget(f"ase_uq.backends.{name}", monkeypatch)
    _forget(package, monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf'not installed\. Run: pip install "ase-uq\[{name}\]"'):
        load_backend(spec)


def test_installed_but_broken_package_says_so_itself(monkeypatch: pytest.MonkeyPatch):
    _forget("ase_uq.backends.mace", monkeypatch)
    monkeypatch.setitem(sys.modules, "mace.calculators", ModuleType("mace.calculators"))
    with pytest.raises(ImportError, match="cannot import name 'MACECalculator'") as error:
        load_backend("mace:x.model")
    assert not isinstance(error.value, MissingDependency)


def _forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [key for key in sys.modules if key == package or key.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, loaded)


class TestPlugins:
    def test_spec(self, plugin: str):
        assert "plugin" in available_backends()
        calculator = calculator_from_spec("plugin:target", device="cpu", dtype="float32")
        assert calculator.asked == ("plugin", "target", "cpu", "float32")  # pyright: ignore

    def test_calculator(self, plugin: str):
        assert load_backend("plugin:").name == "plugin"

    def test_calculator_that_no_plugin_takes(self, plugin: str):
        with pytest.raises(
            TypeError, match=r"no backend knows EMT .* Backends here: mace, orb, plugin, (sevennet, )?toy"
        ):
            load_backend(EMT())

    def test_missing_package(self, plugin: str, tmp_path: Path):
        (tmp_path / "some_plugin.py").write_text("import not_installed_anywhere")
        with pytest.raises(
            MissingDependency, match=r"plugin backend cannot be imported .*pip install --upgrade some-plu"
        ):
            load_backend("plugin:")
        with pytest.raises(TypeError, match=r"Plugins that could not be asked: the plugin backend cannot be imported"):
            load_backend(EMT())
        assert load_backend("toy:").name == "toy"
