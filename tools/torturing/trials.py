# SPDX-License-Identifier: Apache-2.0
"""Misfortunes: a kill, a full disk, a rival. Each trial returns what came of it, or raises what must not."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.forks import MAIN, MAIN_FORKING, ForkedCommands
from support.hub_server import Hub
from support.processes import holds_within, processes_in

from torturing.scenarios import OLD, Contents, Mixed, Scenario, contents, hub, published

WORKER_ENDS = 30.0  # seconds, on a busy machine; an idle one needs a tenth of one


@dataclass
class Found:
    """Of one scenario and one misfortune: how often what came of it, and what must not be."""

    scenario: str
    misfortune: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Trial:
    """A scenario in a folder of its own."""

    scenario: Scenario
    root: Path
    commands: ForkedCommands
    hub: Hub | None

    def __post_init__(self) -> None:
        self.template, self.work = self.root / "template", self.root / "work"
        self.temporary = self.root / "temporary"  # the system's folder for temporary files, as commands see it
        for folder in (self.template, self.temporary):
            folder.mkdir(parents=True)
        with contextlib.chdir(self.template):
            self.scenario.make()
        self.fresh()
        self.before = self.now()
        for _ in range(2):  # the first run waits for the imports
            self.fresh()
            started = time.perf_counter()
            code, said = self.run(self.scenario.command)
            self.takes = time.perf_counter() - started
            if code:
                raise RuntimeError(f"{self.scenario.name} fails undisturbed: {said}")
        self.after = self.now()
        self.listing = set(self.after)

    def fresh(self, work: Path | None = None) -> Path:
        """The world as it is before the command."""
        self.work = work or self.root / "work"
        if self.work.is_dir():
            shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work)
        os.chdir(self.work)
        if self.hub is not None:
            self.hub.repos.clear()
            self.hub.objects.clear()
        return self.work

    def now(self) -> Contents:
        return contents(self.work) | (published(self.hub) if self.hub is not None else {})

    def state(self) -> str:
        return self.scenario.state(self.now(), self.before, self.after)

    def environment(self) -> Mapping[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        kept["TMPDIR"] = str(self.temporary)
        if self.hub is None:
            return {**kept, "HF_HUB_OFFLINE": "1"}
        home = str(self.root / "home")
        return {**kept, "HF_ENDPOINT": self.hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "write"}

    def start(self, command: Sequence[str]) -> Any:
        code = MAIN_FORKING if self.scenario.trains else MAIN
        return self.commands.start(code, *command, environment=self.environment())

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        process = self.start(command)
        out, error = process.communicate()
        return process.wait(), out[-1000:] + error[-2000:]

    def check_end(self, what: str) -> None:
        """After a run that ended well: what an undisturbed one leaves, and nothing else."""
        if self.state() == OLD and self.before != self.after:
            raise Mixed(f"{what}: still the old one")
        there = {name for name in self.now() if "/__pycache__/" not in name}
        if left := there - self.listing:
            raise Mixed(f"{what}: {sorted(left)} left behind")
        if missing := self.listing - there:
            raise Mixed(f"{what}: {sorted(missing)} missing")
        if left := {path.name for path in self.temporary.iterdir()}:
            raise Mixed(f"{what}: {sorted(left)} left in the folder for temporary files")

    def check_nobody_works_on(self) -> None:
        """After a kill: the processes that the command had started end too."""
        if not holds_within(WORKER_ENDS, lambda: not processes_in(self.temporary)):
            raise Mixed(f"processes {processes_in(self.temporary)} live on")


@contextlib.contextmanager
def trial(scenario: Scenario, root: Path, commands: ForkedCommands) -> Iterator[Trial]:
    home = Path.cwd()
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(hub()) if scenario.hub else None
        try:
            yield Trial(scenario, root / scenario.name, commands, started)
        finally:
            os.chdir(home)
            shutil.rmtree(root / scenario.name, ignore_errors=True)


@contextlib.contextmanager
def counted(found: Found, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found.outcomes["finding"] += 1
        found.findings.append(f"{what}: {type(error).__name__}: {error}")


# --- kills -----------------------------------------------------------------------------------------------


def kills(tried: Trial, count: int) -> Found:
    """SIGKILL at `count` moments from the start to the end; each time the next run goes through, and leaves nothing."""
    found, started = Found(tried.scenario.name, "kill"), time.perf_counter()
    for number in range(count):
        moment = tried.takes * 1.05 * (number + 0.5) / count
        with counted(found, f"killed after {moment:.3f} s of {tried.takes:.3f}"):
            tried.fresh()
            process = tried.start(tried.scenario.command)
            time.sleep(moment)
            process.kill()
            process.communicate()
            killed = process.wait() == -signal.SIGKILL
            tried.check_nobody_works_on()
            state = tried.state()
            again = tried.scenario.again or tried.scenario.command
            code, said = tried.run(again)
            if code and not (code == 2 and state == "new" and "exists" in said):
                raise Mixed(f"{state} was there, and the next run ends with {code}: {said[-300:]}")
            tried.check_end("the next run")
            found.outcomes[f"{state} after a kill" if killed else "ended before the kill"] += 1
    found.seconds = time.perf_counter() - started
    return found


# --- full disks ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory with `size` bytes. Needs the right to mount."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        os.chdir(folder.parent)
        subprocess.run(["umount", "-l", folder], check=True)


def _used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def full_disks(tried: Trial, count: int) -> Found:
    """The world on disks with room for ever more of what the command writes: it ends with exit code 6 and what was
    there, or well; once there is room the same command goes through."""
    found, started = Found(tried.scenario.name, "full disk"), time.perf_counter()
    page = os.sysconf("SC_PAGE_SIZE")
    with small_disk(tried.root / "disk", 2**30) as disk:
        tried.fresh(disk / "work")
        held = _used(disk)
        written = sum(-(-len(data) // page) * page + page for data in tried.after.values())
    for number in range(count):
        size = held + (written * number // count // page) * page
        with counted(found, f"{size} bytes"), small_disk(tried.root / "disk", size) as disk:
            tried.fresh(disk / "work")
            code, said = tried.run(tried.scenario.command)
            if code not in (0, 6):
                raise Mixed(f"exit code {code}: {said[-400:]}")
            line = said.strip().splitlines()[-1]
            says_so = any(word in line for word in ("space", "quota", "free"))
            if code == 6 and not (line.startswith("lrconvert: ") and says_so):
                raise Mixed(f"says {line}")
            state = tried.state()
            if code == 6:
                hidden = [name for name in set(tried.now()) - set(tried.before) if "/." in f"/{name}"]
                if hidden:
                    raise Mixed(f"{hidden} left behind")
                subprocess.run(["mount", "-o", f"remount,size={size + 4 * written}", disk], check=True)
                code, said = tried.run(tried.scenario.command)
                if code:
                    raise Mixed(f"with room again: exit code {code}: {said[-400:]}")
                tried.check_end("with room again")
                found.outcomes[f"exit 6, {state}"] += 1
            else:
                tried.check_end("with enough room")
                found.outcomes["enough room"] += 1
    found.seconds = time.perf_counter() - started
    return found


# --- races -----------------------------------------------------------------------------------------------


def races(tried: Trial, count: int, seed: int = 0) -> Found:
    """The command and its rival, started up to one run's time apart: one of them wins, and nothing is mixed."""
    found, started, rng = Found(tried.scenario.name, "race"), time.perf_counter(), random.Random(seed)
    rival = tried.scenario.rival or tried.scenario.command
    for _ in range(count):
        apart = rng.random() * tried.takes * rng.choice((0.05, 0.5, 1.0))
        with counted(found, f"{apart:.3f} s apart"):
            tried.fresh()
            first = tried.start(tried.scenario.command)
            time.sleep(apart)
            second = tried.start(rival)
            said = [process.communicate() for process in (first, second)]
            codes = [process.wait() for process in (first, second)]
            if 0 not in codes or not set(codes) <= {0, *tried.scenario.loses}:
                raise Mixed(f"exit codes {codes}: {[error[-300:] for _, error in said]}")
            state = tried.state() if rival is tried.scenario.command else "whole"
            code, last = tried.run(tried.scenario.command)
            if code and not (code == 2 and "exists" in last):
                raise Mixed(f"after {codes} the next run ends with {code}: {last[-300:]}")
            tried.check_end("the next run")
            found.outcomes[f"{state}, exit codes {sorted(codes)}"] += 1
    found.seconds = time.perf_counter() - started
    return found
