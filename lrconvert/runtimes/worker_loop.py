# SPDX-License-Identifier: Apache-2.0
"""What every worker does: JSON lines in, JSON lines out, one object each; whatever libraries print goes to stderr.

Workers load this file by its path and import nothing of lrconvert: what they compute is what a user's program
computes. (Their folder must not come on sys.path: `transformers.py` in it would be imported as the library.)
"""

import contextlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class NoDevice(RuntimeError):
    """The device that was asked for isn't there, or can't hold the model."""


def serve(open_worker, remedy):
    """Answer `open`, and every other method of the worker (`logits`, `generate`); a worker's `rest`, where it has one,
    is called after each. `remedy` is what to install where a module is missing."""
    worker: Any = None
    requests: Any = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, Path.cwd().parent), daemon=True).start()
    while True:
        request = requests.get()
        try:
            if request["do"] == "open":
                worker = open_worker(request)
                answer = worker.info
            else:
                answer = getattr(worker, request["do"])(request)
                if hasattr(worker, "rest"):
                    worker.rest()
        except ModuleNotFoundError as error:
            answer = {"missing": error.name or str(error), "remedy": remedy}
        except NoDevice as error:
            answer = {"no_device": str(error)}
        except Exception as error:  # the parent reports it and ends the session
            answer = _failed(error)
        with contextlib.suppress(BrokenPipeError):  # the parent is gone, and `_read` ends this process
            ANSWERS.write(json.dumps(answer) + "\n")
            ANSWERS.flush()


def _failed(error):
    """What went wrong: the machine's matter where memory ran out, otherwise the artifact's."""
    shortage = _beside("shortage")
    if shortage.is_shortage(error):
        return {"no_memory": shortage.told(error)}
    lines = str(error).strip().splitlines() or [""]
    return {"error": f"{type(error).__name__}: {lines[0]}"}


def _read(requests, folder):
    """Pass requests on until the parent says that it needs no more, or is gone: then this process ends at once,
    whatever it computes. `folder` is what the parent made for it."""
    with os.fdopen(os.dup(0)) as lines:  # not sys.stdin: Python can't end while a thread reads that
        for line in lines:
            request = json.loads(line)
            if request["do"] == "end":
                break
            requests.put(request)
        else:
            _remove_folders_of_parent(folder)
    # Nobody waits for anything any more: libraries would take seconds to take themselves apart.
    sys.stderr.flush()
    os._exit(0)


def _remove_folders_of_parent(folder):
    """What a parent that was killed could not remove. Its locks end with it, a moment after its pipes."""
    temporary = _beside("temporary")
    for _ in range(20):
        time.sleep(0.1)
        temporary.remove_abandoned(folder.parent)
        if not folder.exists():
            break


def _beside(name):
    """A module of lrconvert's that imports none."""
    spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
