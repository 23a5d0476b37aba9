# SPDX-License-Identifier: Apache-2.0
"""What this process may use of the machine, and refusals of what is too large for it before any work is done.

    check_disk(output.parent, nbytes, "llama.gguf", fits=lambda free: "--type q4_k_m takes 4.1 GB")
    check_memory(nbytes, "the weights in float32")

Both raise `EnvironmentFailure` (exit code 6) with what is needed, what there is, and what would fit. `within_memory`
raises one for what no refusal foresaw.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lrconvert.errors import EnvironmentFailure, LrconvertError
from lrconvert.shortage import is_shortage, told

MEMINFO = Path("/proc/meminfo")  # Linux
# Limits of a container, a service or a job (Linux): a process's groups, and by the controller's name in them (none in
# cgroup v2) the tree that they are in and its file. The limits of all groups above hold too.
OWN_GROUPS = Path("/proc/self/cgroup")
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}

Fits = Callable[[int], str]  # from the bytes that there are to words on what would fit them, "" for none


def usable_cores() -> int:
    """Cores that this process may use: of a container or a job, not of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_disk(place: Path) -> int:
    """Bytes that this user may still write at `place`, which need not exist yet."""
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def total_memory() -> int:
    """Bytes of main memory that this process may have, used or not."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def usable_memory() -> int:
    """Bytes of main memory that this process may have now: what others use is taken off where the system says it.
    Swap counts, and what the kernel caches."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = sum(int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return total_memory()
    return min([free, *_limits()])


def gpu_memory(device: str) -> int | None:
    """Bytes of memory that a GPU has, used or not; None where PyTorch can't say."""
    try:
        import torch

        number = torch.device(device).index or 0
        known = number < torch.cuda.device_count()  # who computes there says what is missing
        return int(torch.cuda.get_device_properties(number).total_memory) if known else None
    except (ImportError, RuntimeError):
        return None


def release_freed() -> None:
    """Memory that was freed goes back to the system. glibc keeps what lies between blocks that are still in use: half a
    gigabyte after a pass over SmolLM2-135M. Other C libraries have no such call."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> list[int]:
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines() if line.count(":") > 1]
    except OSError:
        lines = []
    own = {name: group.strip("/") for _, names, group in lines for name in names.split(",")}
    found = []
    for name, (tree, file) in CGROUPS.items():
        inside = own.get(name, "")
        group = tree if ".." in inside else tree / inside  # another namespace's, which can't be seen here
        for folder in (group, *group.parents):
            if not folder.is_relative_to(tree):
                break
            try:
                found.append(int((folder / file).read_text()))
            except (OSError, ValueError):  # none, or "max"
                continue
    return found


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def check_disk(place: Path, needed: int, what: str, *, fits: Fits | None = None, remedy: str | None = None) -> None:
    """Refuse what `place` has no room for."""
    if needed > (free := free_disk(place)):
        _refuse(f"{place}: {what} takes {needed:,} bytes, {free:,} are free", fits, free,
                remedy or "Make room, or choose another disk")  # fmt: skip


def check_memory(
    needed: float,
    what: str,
    *,
    device: str = "cpu",
    has: int | None = None,
    fits: Fits | None = None,
    remedy: str | None = None,
) -> None:
    """Refuse what takes more memory than there is: `has`, by default what this process may have of a device. What a GPU
    lacks that PyTorch knows nothing of, the program that loads it says."""
    if has is None:
        has = gpu_memory(device) if device.startswith("cuda") else usable_memory()
    if has is not None and needed > has:
        _refuse(f"{what} takes {size(needed)} of memory or more, {size(has)} are there", fits, has,
                remedy or "Use a machine with more memory")  # fmt: skip


@contextlib.contextmanager
def within_memory(what: str, *, remedy: str) -> Iterator[None]:
    """Memory that runs out in `what` all the same is the machine's matter, not the input's and no bug."""
    try:
        yield
    except LrconvertError:
        raise
    except Exception as error:
        if not is_shortage(error):
            raise
        raise EnvironmentFailure(f"{what} ran out of memory: {told(error)}", remedy=remedy) from error


def _refuse(text: str, fits: Fits | None, has: int, remedy: str) -> None:
    would = fits(has) if fits is not None else ""
    raise EnvironmentFailure(f"{text}; {would}" if would else text, remedy=remedy)
