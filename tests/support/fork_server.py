# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own, `python fork_server.py LISTENER MODULE…`: imports modules, then forks a process
for every request. Ends when nobody is connected any more.

A request is one message of JSON: `script` (a path) or `code`, `arguments`, `environment`, `folder` and, for more places
to import from, `path`. It comes with four file descriptors: stdin, stdout, stderr, and one for the process's id and,
once it has ended, its exit status. Nothing is computed here, and no thread started. Any interpreter may run this file:
it imports nothing of the tests.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
import tempfile
import traceback


def run(request, streams):
    """What `python SCRIPT` and `python -c CODE` do, but for the imports that are made already."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # what this process found is not what a fresh one finds
    # transformers reads it when it is imported; every session has one of its own.
    modules = request["environment"].get("HF_MODULES_CACHE")
    for name, module in list(sys.modules.items()):
        if modules and name.startswith("transformers.") and "HF_MODULES_CACHE" in vars(module):
            vars(module)["HF_MODULES_CACHE"] = modules
    sys.path[:0] = request.get("path", [])
    sys.argv = [request.get("script", "-c"), *request["arguments"]]
    code = 0
    try:
        if "script" in request:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch(process, report):
    """Say the process's id, then how it ended."""
    os.write(report, b"%d\n" % process)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):  # who wanted to know was killed
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def answer(message, descriptors, inherited):
    """Fork what a message asks for, without the server's own sockets."""
    *streams, report = descriptors
    if os.fork() == 0:
        for each in inherited:
            each.close()
        process = os.fork()
        if process == 0:
            os.close(report)
            run(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        watch(process, report)
    for descriptor in descriptors:
        os.close(descriptor)


def serve(listener):
    """Until every client is gone and every process has ended."""
    clients = []
    while True:
        ready, _, _ = select.select([listener, *clients], [], [])
        for connection in ready:
            if connection is listener:
                clients.append(listener.accept()[0])
                clients[-1].sendall(b"ready")
                continue
            message, descriptors = received(connection)
            if message:
                answer(message, descriptors, (listener, *clients))
            else:
                clients.remove(connection)
                connection.close()
            reap(os.WNOHANG)
        if not clients:
            break
    listener.close()
    reap(0)


def received(connection):
    """A message and its file descriptors; nothing of a client that is gone."""
    try:
        message, data, _, _ = connection.recvmsg(2**20, socket.CMSG_SPACE(4 * array.array("i").itemsize))
    except ConnectionError:
        return b"", []
    descriptors = array.array("i")
    for _, _, part in data:
        descriptors.frombytes(part)
    return message, descriptors


def reap(flags):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, flags) != (0, 0):
            pass


if __name__ == "__main__":
    if not sys.flags.isolated:
        sys.path[0] = ""  # as -c has it; this file's folder is none of theirs
    for name in sys.argv[2:]:
        with contextlib.suppress(ImportError):  # whoever needs it says so
            importlib.import_module(name)
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
