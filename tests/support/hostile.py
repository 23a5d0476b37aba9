# SPDX-License-Identifier: Apache-2.0
"""What a command may answer to damaged input, whatever its format."""

from __future__ import annotations

import contextlib
import io
import warnings

from lrconvert.cli import run


def answer(*arguments: object) -> tuple[int, str]:
    """Exit code and errors of a command; a warning of a library would be a second line for its user."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("error")
        code = run([str(argument) for argument in arguments])
    lines = said.getvalue().splitlines()
    if code:
        assert code in (3, 4), lines
        assert lines[-1].startswith("lrconvert: ") and all(line.startswith("warning: ") for line in lines[:-1]), lines
    return code, said.getvalue()
