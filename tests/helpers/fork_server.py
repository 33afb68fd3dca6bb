"""Runs Python commands as forks of a process that has imported torch and transformers, which takes eleven seconds.

A forked command is a process of its own, with its arguments, environment, directory, streams and exit code; it can be
killed, and the Python commands that it starts are forked as well. Only what libraries read from the environment on
import (HF_ENDPOINT, say) is the server's. Computations use one thread.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("fork_client.py")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class ForkServer:
    """Starts the server on the first use; `run` and `Popen` are subprocess's, for commands of this Python."""

    def __init__(self, folder: Path):
        self.address = str(folder / "fork-server")
        self.log = folder / "fork-server.log"
        self.process = None

    def start(self) -> None:
        if self.process is None:
            command = [sys.executable, "-m", "tests.helpers.fork_server", self.address]
            streams = {"stderr": subprocess.STDOUT, "cwd": ROOT, "env": {**os.environ, **ONE_THREAD}}
            with socket.socket(socket.AF_UNIX) as listener, self.log.open("wb") as log:
                listener.bind(self.address)
                listener.listen()  # clients wait until it has loaded
                self.process = subprocess.Popen(command, stdin=listener, stdout=log, **streams)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def wait_until_idle(self) -> None:
        """Until nothing that it forked runs: what is killed through its client ends a moment later."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while children.read_text():
            time.sleep(0.005)

    @property
    def launcher(self) -> str:
        """For a recipe: forks a stage's command."""
        self.start()
        return shlex.join(_client(self.address))

    @property
    def Popen(self):
        self.start()
        return type("Popen", (_Popen,), {"address": self.address})

    def run(self, command: list, **options) -> subprocess.CompletedProcess:
        """subprocess.run with the output captured as text."""
        with self.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


class _Popen(subprocess.Popen):
    """A process; forked where it is one of this Python, by its interpreter or a console script."""

    address: str

    def __init__(self, command, *args, **options):
        if not isinstance(command, str) and _is_python([str(word) for word in command]):
            command = [*_client(self.address), *map(str, command)]
        super().__init__(command, *args, **options)


def _client(address: str) -> list[str]:
    return [sys.executable, "-IS", str(CLIENT), address]


def _is_python(command: list[str]) -> bool:
    """Whether it is `python -m MODULE ...`, `python FILE ...` or a console script of this Python."""
    if command[0] == sys.executable:
        return command[1] == "-m" or not command[1].startswith("-")
    return Path(command[0]).parent == Path(sysconfig.get_path("scripts")) and os.access(command[0], os.X_OK)


def serve(address: str) -> list[str]:
    """Fork two processes for each request; returns in the second, with its command."""
    with socket.socket(fileno=0) as listener:
        signal.signal(signal.SIGCHLD, _reap)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with client:
        size, streams, _, _ = socket.recv_fds(client, 4, 3)
        request = client.makefile("rb").read(int.from_bytes(size, "big"))
        process = os.fork()
        if process:
            _accompany(process, client)
    return _become(json.loads(request), streams, address)


def _reap(*_) -> None:
    """Take the ended children off the list, so that their time counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _accompany(process: int, client: socket.socket) -> None:
    """Tell the client the exit code, or kill the process when the client is killed."""
    ended = os.pidfd_open(process)
    if client in select.select([client, ended], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(str(code).encode())
    os._exit(0)


def _become(request: dict, streams: list[int], address: str) -> list[str]:
    """Take on what the request says; Python commands and pools started from here are forked as well."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    subprocess.Popen = type("Popen", (_Popen,), {"address": address})
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)
    return request["command"]


def run_command(words: list[str]) -> None:
    """Run a Python command in this process, with one thread.

    That is set here: a fork of a process that has torch's pool makes it anew, and two threads that do so at once fail.
    """
    import torch

    torch.set_num_threads(1)
    words = words[1:] if words[0] == sys.executable else words
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def load() -> None:
    """Import what the commands of the packages and of mergekit import."""
    import datasets  # noqa: F401
    import mergekit.scripts.run_yaml  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import fusechat_fuse.training.run  # noqa: F401
    import fusechat_merge.method  # noqa: F401


def exit_with(code) -> None:
    """End as the interpreter does, without the seconds that it takes to free all modules."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


if __name__ == "__main__":
    load()
    gc.freeze()
    command = serve(sys.argv[1])
    try:
        run_command(command)
    except SystemExit as error:
        exit_with(error.code)
    except BaseException:
        traceback.print_exc()
        exit_with(1)
    exit_with(0)
