"""An interpreter for commands that tests start, which has Megatron, torch and transformers loaded: it forks.

A training run's imports take some four CPU seconds, in each rank of each command. `python()` writes a small program
for `python`'s place (sys.executable's): it sends its arguments, environment, folder and
open files to a server, which forks and runs the script from its first line to its exit code. All else is real.
"""

import array
import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import processes

_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(request)
sys.exit(int(server.recv(16) or 70))
"""


#: what is loaded for commands that do not train, and must see CUDA as it is
WITHOUT_MEGATRON = (
    "torch._dynamo",
    "torch.distributed.run",
    "numpy",
    "transformers.models.llava_onevision.modeling_llava_onevision",
    "megatron.energon",
    "webdataset",
    "safetensors.torch",
)


def python(*, with_megatron: bool = True) -> str:
    """The program's path, beside a torchrun that is run by it. The server that it asks ends with this process.

    Args:
        with_megatron: loaded, and made to run on the CPU, as for all ranks (warm.py); else WITHOUT_MEGATRON is.
    """
    folder = Path(
        tempfile.mkdtemp(prefix="rsa-")
    )  # not below pytest's: the address of a socket has 108 characters at most
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, address = folder / "python", str(folder / "server")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    if with_megatron:
        processes.CONTEXT.Process(target=_serve, args=(listener, str(program)), daemon=True).start()
    else:
        code = f"from tests.support import preloaded; preloaded.serve_without_megatron({listener.fileno()}, {str(program)!r})"
        environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # tests have no time to compile
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, pass_fds=[listener.fileno()]
        )
        atexit.register(server.kill)
    listener.close()
    program.write_text(_CLIENT.format(python=sys.executable, address=address))
    (folder / "torchrun").write_text(f'#!/bin/sh\nexec {program} -m torch.distributed.run "$@"\n')
    for file in (program, folder / "torchrun"):
        file.chmod(0o755)
    return str(program)


def serve_without_megatron(file: int, program: str) -> None:
    for module in WITHOUT_MEGATRON:
        importlib.import_module(module)
    _serve(socket.socket(fileno=file), program)


def _serve(listener: socket.socket, program: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection, program)
        connection.close()


def _answer(connection: socket.socket, program: str) -> None:
    """Run a request in a process of its own and send its exit code. It gets the client's signals, and is killed if that is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, rights, *_ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    files = array.array("i", rights[0][2])
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(2**16)
    arguments, environment, folder = json.loads(request)
    child = os.fork()
    if child == 0:
        connection.close()
        os.setpgid(0, 0)
        sys.executable = program  # for what the script starts in its turn
        _run(arguments, environment, folder, files)
    for file in files:
        os.close(file)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
            os._exit(0)
        if select.select([connection], [], [], 0.02)[0]:
            signals = connection.recv(16)
            for number in signals:
                os.kill(child, number)
            if not signals:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                os._exit(0)


def _run(arguments: list[str], environment: dict, folder: str, files) -> None:
    for target, file in enumerate(files):
        os.dup2(file, target)
    multiprocessing.current_process()._config["daemon"] = False  # the server's: the script may have children
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout.reconfigure(line_buffering=True)
    code = 0
    try:
        arguments = [word for word in arguments if word != "-u"]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
