# SPDX-License-Identifier: Apache-2.0
"""Somebody at a command line who publishes to the Hub of `support.hub_server`, and what they see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Result
from support.forks import MAIN, ForkedCommands
from support.hub_server import Hub, Token, serve

ID = "me/artifact"


# The client waits 1, 2, 4, 8 and 8 seconds between its tries of a request; here it tries as often and does not wait.
MAIN_HURRIED = f"""
import time
time.sleep = lambda seconds: None
{MAIN}
"""


@dataclass
class User:
    """Somebody at a command line, with a token and a cache of their own."""

    hub: Hub
    home: Path
    commands: ForkedCommands
    token: str | None = "write"

    def env(self, **changes: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        return {**kept, **own, **({"HF_TOKEN": self.token} if self.token else {}), **changes}

    def python(self, code: str, *arguments: object, **changes: str) -> Result:
        done = self.commands.run(code, *arguments, environment=self.env(**changes))
        assert "Traceback" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments: object, **changes: str) -> Result:
        return self.python(MAIN, *arguments, **changes)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as started:
        started.tokens |= {
            "write": Token("me"),
            "read": Token("me", "read"),
            "chosen": Token("me", "fineGrained", ["repo.content.read", "repo.write"]),
            "chosen-read": Token("me", "fineGrained", ["repo.content.read"]),
            "other": Token("other"),
        }
        yield started


@pytest.fixture
def user(hub: Hub, tmp_path: Path, commands: ForkedCommands) -> User:
    return User(hub, tmp_path / "home", commands)


def published(hub: Hub, name: str = ID) -> dict[str, bytes]:
    return {path: data for path, data in hub.repos[name].head.items() if path != ".gitattributes"}


def ok(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def refused(result: Result, code: int, *words: str) -> None:
    """One line with these words, as the last one, and the exit code."""
    assert result.code == code, result
    line = result.err.splitlines()[-1]
    assert line.startswith("lrconvert: ")
    for word in words:
        assert word in line
