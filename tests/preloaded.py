"""Commands of the reader's, in processes that are forked from one in which the potentials' packages are imported.

A fresh interpreter imports mace, orb and torch for longer than most blocks of the documentation then run. A folder for
the PATH has a `python`, an `ase-uq` and an `i-pi` that hand their arguments, files, folder and environment over to that
one process; it forks for each, and what a command leaves behind goes with its process. What depends on a fresh
interpreter (an option of Python's) gets one.

The process is one for a whole run of the tests, whatever number of workers they have; see `preloaded_bin` in
conftest.py.
"""

import atexit
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "ase_uq.cli",
    "ase_uq.backends.mace",
    "ase_uq.backends.orb",
    *(["ase_uq.backends.sevennet"] if importlib.util.find_spec("sevenn") else []),
    "ase_uq.engines.ase.calculator",
    "ase_uq.fitting.fit",
    "ase_uq.report.page",
    "matplotlib.pyplot",
)
CLIENT = """#!{python} -SE
import json, os, socket, sys
request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as there:
    there.connect({address!r})
    socket.send_fds(there, [len(request).to_bytes(8, "big")], [0, 1, 2])
    there.sendall(request)
    told = there.recv(1)
sys.exit(told[0] if told else "the process died")
"""


class Server:
    """The process, which imports while others collect tests.

    Attributes:
        bin: The folder for the PATH.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.bin = Path(self._folder.name)
        address = str(self.bin / "socket")
        for name in ("python", "ase-uq", "i-pi"):
            client = self.bin / name
            client.write_text(CLIENT.format(python=sys.executable, name=name, address=address))
            client.chmod(0o755)
        # What packages print is of no interest; the first line says that clients may come, and wait.
        command = [sys.executable, "-W", "ignore", __file__, address]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"listening\n"

    def close(self) -> None:
        """Ends the process; commands that run go on."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def serve(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(address)
        here.listen()
        print("listening", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for module in MODULES:
            importlib.import_module(module)
        load_potentials_quickly()
        shorten()
        gc.freeze()  # a collection in a child would copy every page
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children tell their clients how they ended
        while True:
            client, _ = here.accept()
            with client:
                if not os.fork():
                    here.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(client)


def keep_tables() -> None:
    """What e3nn and mace compute whenever a potential is made, and what depends on its architecture alone."""
    # Not at the top: the tests import this file, and neither of these.
    import e3nn.math._normalize_activation
    from mace.modules import symmetric_contraction

    for module, name in ((symmetric_contraction, "U_matrix_real"), (e3nn.math._normalize_activation, "moment")):
        setattr(module, name, functools.cache(getattr(module, name)))


def leave_uncompiled() -> None:
    """e3nn leaves the code that it generates as it is: to compile it takes longer than most tests then run."""
    import e3nn

    e3nn.set_optimization_defaults(jit_script_fx=False, optimize_einsums=False)


def load_potentials_quickly() -> None:
    """Every block loads a potential."""
    from ase_uq import embedded
    from ase_uq.backends import load_backend
    from ase_uq.backends.mace import loading as mace
    from ase_uq.backends.orb import loading as orb
    from ase_uq.report.viewer import packed, plotly_script

    keep_tables()
    # Compiled once for all: with this one, whole runs are made.
    ready = once_ready(mace.load_potential, [(str(embedded.path("mace.safetensors")),)])
    leave_uncompiled()
    for name in ("mace", "orb-direct", "orb-conservative"):
        load_backend(f"embedded:{name}", device="cpu")
    mace.load_potential = ready
    names = ("orb_direct.safetensors", "orb_conservative.safetensors")
    orb.load_potential = once_ready(orb.load_potential, [(str(embedded.path(name)), "cpu", "") for name in names])
    packed(plotly_script())  # and every page of a report holds this


def once_ready(load: Callable[..., Any], calls: list[tuple[str, ...]]) -> Callable[..., Any]:
    """The same, which has made the results of these calls already; each is given away once, as it may be changed."""
    ready = {arguments: load(*arguments) for arguments in calls}
    return lambda *arguments: ready.pop(arguments) if arguments in ready else load(*arguments)


def with_few_resamples(bootstrap: Callable[..., Any]) -> Callable[..., Any]:
    """The same, of five resamples at most."""

    def few(*rows: Any, n_resamples: int, **options: Any) -> Any:
        return bootstrap(*rows, n_resamples=min(n_resamples, 5), **options)

    return few


def shorten() -> None:
    """What takes long, and what no page is about: compilers, networks, intervals of scores, pixels of pictures."""
    import torch._dynamo
    from matplotlib.figure import Figure

    from ase_uq import metrics
    from ase_uq.fitting import combination
    from ase_uq.methods.pdrum import method

    def briefly(cross_fit: Callable[..., Any]) -> Callable[..., Any]:
        def short(*rows: Any, training: Any, **options: Any) -> Any:
            return cross_fit(*rows, training=dataclasses.replace(training, max_epochs=10), **options)

        return short

    torch._dynamo.config.disable = True  # orb's loaders compile where they can
    for module in (combination, method):
        module.cross_fit = briefly(module.cross_fit)
    metrics.bootstrap = with_few_resamples(metrics.bootstrap)

    def coarsely(figure: Figure, target: Any, save: Callable[..., None] = Figure.savefig, **options: Any) -> None:
        save(figure, target, **{**options, "dpi": 30})

    Figure.savefig = coarsely


def answer(client: socket.socket) -> None:
    """Runs what a client asks for, in this process, which ends with it."""
    size, files, *_ = socket.recv_fds(client, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(1 << 16)
    name, arguments, folder, environment = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as the first import of mace does
    this, leave = os.getpid(), os._exit

    def leave_and_tell(code: int) -> NoReturn:
        """Commands that end at once are heard as well; their own children have nobody to tell."""
        if os.getpid() == this:
            client.sendall(bytes([code]))
        leave(code)

    os._exit = leave_and_tell
    code = run(name, arguments)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # to take down what was imported would take seconds


def begin_as_python_does() -> None:
    """Folders of the PYTHONPATH come first, and their `sitecustomize` is run."""
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder:
            sys.path.insert(1, folder)
        if (custom := Path(folder, "sitecustomize.py")).exists():
            runpy.run_path(str(custom))


def run(name: str, arguments: list[str]) -> int:
    """What the command exits with."""
    if name == "python" and arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        return subprocess.run([Path(sys.executable).with_name(name), *arguments]).returncode
    try:
        begin_as_python_does()
        if name == "ase-uq":
            sys.argv = [name, *arguments]
            importlib.import_module("ase_uq.cli").main()
        elif name == "i-pi":
            sys.argv = [name, *arguments]
            runpy.run_path(str(Path(sys.executable).with_name(name)), run_name="__main__")
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.path[0] = ""
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(module))
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
