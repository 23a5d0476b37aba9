# SPDX-License-Identifier: Apache-2.0
"""What every worker does: JSON lines in, JSON lines out, one object each; whatever libraries print goes to stderr.

Workers load this file by its path and import nothing of lrconvert: what they compute is what a user's program
computes. (Their folder must not come on sys.path: `transformers.py` in it would be imported as the library.)
"""

import json
import os
import sys
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class NoDevice(RuntimeError):
    """The device that was asked for isn't there, or can't hold the model."""


def serve(open_worker, remedy):
    """Answer `open`, and every other method of the worker (`logits`, `generate`); `remedy` is what to install
    where a module is missing."""
    worker: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                worker = open_worker(request)
                answer = worker.info
            else:
                answer = getattr(worker, request["do"])(request)
        except ModuleNotFoundError as error:
            answer = {"missing": error.name or str(error), "remedy": remedy}
        except NoDevice as error:
            answer = {"no_device": str(error)}
        except Exception as error:  # the parent reports it and ends the session
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}
        ANSWERS.write(json.dumps(answer) + "\n")
        ANSWERS.flush()
    # Nobody waits for anything any more: libraries would take seconds to take themselves apart.
    sys.stderr.flush()
    os._exit(0)
