"""Children of the tests without their imports: commands, `lib.runs.child` and kernels, forked.

Most of such a child's time is the import of torch and transformers, five seconds for a work of half a second. A server
imports the libraries once, none of the project's stages, and forks. The child is a process of its own all the same: a
child of whoever started it (which `die_with_parent` and signals need), with the arguments, environment, folder and
streams that it was given; a command's own children are forked as well. What libraries read while they are imported
must be as it was for the server, or the child is started in earnest. In earnest, too, start all tests without the
fixture `forked_children`, so every kind of child: the quick report, the golden results, those of killed processes,
speed and imports.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

PARENTS = ("lib.cli", "lib.report.execute", "ipykernel_launcher")
"""Their own children are forked too."""
MODULES = (*PARENTS, "lib.runs.child", "tests.stages.finetune.forked")
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "MKL_", "OPENBLAS", "CUDA", "GGML_", "LD_", "XDG_", "HOME")
NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers loads weights in threads; a forked process sometimes has no thread pool for them."""
MEASURED = "COVERAGE_PROCESS_CONFIG"
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: whose grandchild is orphaned becomes its parent
REAL = subprocess.Popen
LIBRARIES = (
    "torch",
    "peft",
    "gguf",
    "pydantic",
    "yaml",
    "typer",
    "psutil",
    "scipy.stats",
    "statsmodels.stats.multitest",
)
LIBRARIES += ("matplotlib.pyplot", "papermill", "nbclient", "jupyter_client.launcher", "ipykernel.kernelapp")
CLASSES = "AutoModelForCausalLM", "AutoTokenizer", "Qwen2ForCausalLM", "Trainer"
_lock = threading.Lock()
_server: Server | None = None


class Server:
    """The client's end of the socket to a server, which is a child of this process."""

    def __init__(self, connection: socket.socket, environment: dict[str, str]) -> None:
        self.connection, self.environment = connection, environment

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        """The process id of a new child of this process."""
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        with _lock:
            prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                data = json.dumps(request).encode()
                socket.send_fds(self.connection, [struct.pack("!I", len(data))], streams)
                self.connection.sendall(data)
                (pid,) = struct.unpack("!I", _exactly(self.connection, 4))
                while _parent(pid) != os.getpid():
                    time.sleep(0.001)
            finally:
                prctl(SUBREAPER, 0, 0, 0, 0)
        return pid


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Popen(REAL):
    """A process that the server forks where it can: one of MODULES."""

    code = False

    def _execute_child(self, *arguments: Any) -> None:
        asked = inspect.signature(REAL._execute_child).bind(self, *arguments).arguments
        request = _request(asked, self.code)
        if request is None or _server is None:
            return super()._execute_child(*arguments)
        given = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        self.pid = _server.start(request, [own if fd == -1 else fd for own, fd in enumerate(given)])
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in PIPES))
        return None


class CodePopen(Popen):
    """`python -c` too, for code whose imports prove nothing."""

    code = True


STREAMS = ("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace")
PIPES = "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"
PLAIN = {"preexec_fn": None, "shell": False, "pass_fds": (), "gid": None, "gids": None, "uid": None, "umask": -1}


def _request(asked: dict[str, Any], code: bool) -> dict[str, Any] | None:
    """What the server needs to know; None for a child that cannot be forked."""
    command = [os.fspath(part) for part in asked["args"]] if isinstance(asked["args"], (list, tuple)) else []
    isolated = command[1:2] == ["-P"]
    options = command[2:] if isolated else command[1:]
    known = (code and options[:1] == ["-c"]) or (options[:1] == ["-m"] and options[1] in MODULES)
    if command[:1] != [sys.executable] or not known:
        return None
    if _server is None or any(asked[name] != value for name, value in PLAIN.items()):
        return None
    environment = dict(os.environ if asked["env"] is None else asked["env"])
    cwd = os.fspath(asked["cwd"] or Path.cwd())
    if _import_conditions(environment) != _import_conditions(_server.environment):
        return None
    return {
        "module": options[1] if options[0] == "-m" else None,
        "code": options[1],
        "arguments": options[2:],
        "environment": environment,
        "cwd": cwd,
        "path": ([] if isolated else [cwd]) + environment.get("PYTHONPATH", "").split(os.pathsep),
        "session": asked["start_new_session"],
        "parent": os.getpid(),
    }


def _import_conditions(environment: dict[str, str]) -> dict[str, str]:
    read = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    for name in (NO_THREADS, "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        read.pop(name, None)
    return read


PROJECT = Path(__file__).resolve().parents[2]


def possible() -> bool:
    """On Linux, without a GPU, which a forked process cannot use."""
    return sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


@contextlib.contextmanager
def started() -> Any:
    """A server for this process."""
    global _server
    own, its = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if name != MEASURED}
    environment["PYTHONPATH"] = str(PROJECT)
    command = [sys.executable, "-m", "tests.support.forking", str(its.fileno())]
    process = REAL(command, cwd=PROJECT, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    _server = Server(own, dict(os.environ))
    try:
        yield
    finally:
        _server = None
        own.close()
        process.wait()


def _load() -> None:
    """Libraries alone; of the project only what lets transformers come without scikit-learn."""
    from lib.runs.machine import quiet

    quiet()
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in CLASSES:
        getattr(sys.modules["transformers"], name)


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a child for every request; what the child, in which this returns, is to do, or None at the end."""
    while True:
        try:
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
            request = json.loads(_exactly(connection, struct.unpack("!I", size)[0])) if size else None
        except (EOFError, ConnectionError):
            request = None
        if request is None:
            return None
        middle = os.fork()
        if middle == 0:
            if os.fork():
                os._exit(0)  # an orphan is adopted by the one who asked
            if request["session"]:
                os.setsid()  # before anybody asks for its group
            connection.sendall(struct.pack("!I", os.getpid()))
            connection.close()
            deadline = time.monotonic() + 60
            while os.getppid() != request["parent"]:
                if time.monotonic() > deadline:
                    os._exit(70)
                time.sleep(0.001)
            return {**request, "streams": streams}
        for stream in streams:
            os.close(stream)
        os.waitpid(middle, 0)


def become(request: dict[str, Any]) -> None:
    """Everything that a new process would have of its own, then the module as the main program."""
    if request["module"] in (None, *PARENTS):
        request = _with_own_server(request)
    for number, stream in enumerate(request.pop("streams")):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ[NO_THREADS] = "1"
    os.chdir(request["cwd"])
    sys.path[:0] = filter(None, request["path"])
    for number, (name, mode, errors) in enumerate(STREAMS):
        stream = os.fdopen(number, mode, 1 if name == "stderr" else -1, "utf-8", errors, closefd=False)
        setattr(sys, name, stream)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    import numpy as np

    np.random.seed(None)
    if MEASURED in os.environ:
        import coverage

        coverage.process_startup(force=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
        del sys.modules[name]
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ModuleNotFoundError):
        import sitecustomize  # noqa: F401
    sys.argv = [request["module"] or "-c", *request["arguments"]]
    code = 0
    try:
        if request["module"]:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(request["code"], vars(main))
    except SystemExit as ended:
        code = ended.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # The end of a process, but for the freeing of every library's objects, which would first copy them.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _with_own_server(request: dict[str, Any]) -> dict[str, Any]:
    """A command's children are forked by a server that is its child, as it was before the command began."""
    global _server
    own, its = socket.socketpair()
    if os.fork() == 0:
        own.close()
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(quiet, number)
        for stream in request["streams"]:
            os.close(stream)
        asked = serve(its)
        if asked is None:
            os._exit(0)
        return asked
    its.close()
    _server = Server(own, request["environment"])
    subprocess.Popen = sys.modules["jupyter_client.launcher"].Popen = Popen
    return request


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _load()
    gc.freeze()  # a collection in a child would copy every page
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        become(asked)
