# SPDX-License-Identifier: Apache-2.0
"""Carrying a plan out: one staging folder, one pump, one publication, for every target.

The artifact appears whole or not at all. Its sources are looked at again before it does: a file that changed while
it was read makes the bake fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from lrconvert.artifact.file_staging import FileStaging, check_files, replaced_files
from lrconvert.artifact.hashing_file import HashingFile
from lrconvert.artifact.manifest import FILES, Manifest
from lrconvert.artifact.plan import Plan, Stream
from lrconvert.artifact.prefetch import Job, prefetch
from lrconvert.artifact.redaction import source_record
from lrconvert.artifact.staging import Staging, check_output
from lrconvert.checkpoint.source import check_unchanged
from lrconvert.data import DATA
from lrconvert.errors import LrconvertError, UsageError
from lrconvert.machine import check_disk, size
from lrconvert.progress import BYTES, Progress, Step, silent


def check_name(output: Path, *, force: bool) -> None:
    """What can be refused before the model is opened: a folder in the output's place (exit code 2)."""
    if output.suffix not in FILES:
        check_output(output, force=force)


def check_place(plan: Plan, *, force: bool) -> None:
    """Refuse what exists and may not be replaced, and an artifact in the place of its own source (exit code 2)."""
    if plan.place == "folder":
        check_output(plan.output, force=force)
        return
    gone = {path.resolve() for path in replaced_files(plan.output, plan.names)}
    if sources := [path for path in plan.stamps if path.resolve() in gone]:
        raise UsageError(f"{plan.output} would replace its own source, {sources[0]}", remedy="Choose another name")
    check_files(plan.output, plan.names, force=force)


def check_room(plan: Plan, *, link: bool | None = None) -> None:
    """Refuse what the disk has no room for, and say what it has room for (exit code 6). An artifact that is replaced
    goes away last."""
    place = plan.output.absolute().parent
    linked = 0 if link is False else sum(size for name, size in plan.sizes.items() if _may_link(plan, name, place))

    def fits(free: int) -> str:
        found = [f"{option} takes {size(nbytes)}" for option, nbytes in _lighter(plan) if nbytes <= free]
        return found[0] if found else ""

    check_disk(place, sum(plan.sizes.values()) - linked, plan.output.name, fits=fits)


def _may_link(plan: Plan, name: str, place: Path) -> bool:
    """Whether a file can be a hard link to its source: weights of one file system."""
    path = plan.copies.get(name)
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    return path is not None and name.endswith(".safetensors") and path.stat().st_dev == there.stat().st_dev


def _lighter(plan: Plan) -> Iterator[tuple[str, int]]:
    for option, planned in plan.lighter.items():
        with contextlib.suppress(LrconvertError):  # what this model or machine can't be written as
            yield option, sum(planned().sizes.values())


def bake(plan: Plan, *, force: bool = False, link: bool | None = None, progress: Progress | None = None) -> Manifest:
    """Write the artifact and its manifest.

    `link`: True demands hard links for weights that stay as they are, False copies them, None links where that works,
    except to the embedded model. Raises `UsageError` for an output that may not be replaced, `InputError` for a source
    that changed meanwhile, and `EnvironmentFailure` for what the disk has no room for or refuses.
    """
    check_place(plan, force=force)
    if link is None and plan.model.checkpoint.path.is_relative_to(DATA):
        link = False  # the installed package's own: editing the artifact would edit it
    check_room(plan, link=link)
    report = _Report(plan, progress)
    with _staging(plan, force, link) as staging:
        for name, data in sorted(plan.texts.items()):
            staging.write_bytes(name, data)
            report.done(name, len(data))
        for name, path in sorted(plan.copies.items()):
            # People edit a tokenizer's or generation's config in place: only weights share bytes with the source.
            place = staging.link_or_copy if name.endswith(".safetensors") else staging.copy
            place(path, name, lambda count, name=name: report.done(name, count))
        _pump(staging, plan.streams, report)
        check_unchanged(plan.stamps)
        manifest = Manifest(
            target=plan.target,
            source=source_record(plan.model),
            recipe=asdict(plan.recipe),
            bake=plan.record,
            options=plan.options,
            losses=[*plan.dropped, *plan.losses],
            notes=plan.notes,
        )
        staging.publish(manifest)
    return manifest


def _staging(plan: Plan, force: bool, link: bool | None) -> Staging:
    if plan.place == "files":
        return FileStaging(plan.output, plan.names, force=force)
    return Staging(plan.output, force=force, link=link)


def _pump(staging: Staging, streams: list[Stream], report: _Report) -> None:
    """Write every stream. A few threads make the blocks, ahead of the one that writes and hashes them."""
    tensors = [tensor for stream in streams for tensor in stream.tensors]
    if not tensors:
        return
    with closing(prefetch(_jobs(streams))) as blocks:
        for stream in streams:
            with staging.create(stream.name) as file:
                file.write(stream.header)
                report.done(stream.name, len(stream.header))
                for tensor in stream.tensors:
                    _write(file, blocks, tensor.nbytes, lambda count, name=tensor.name: report.done(name, count))
                    file.write(bytes(tensor.padding))
                    report.done(tensor.name, tensor.padding)


def _jobs(streams: list[Stream]) -> Iterator[Job]:
    for stream in streams:
        for tensor in stream.tensors:
            yield from tensor.jobs()


def _write(file: HashingFile, blocks: Iterator[memoryview], nbytes: int, done: Callable[[int], None]) -> None:
    left = nbytes
    while left:
        block = next(blocks)
        file.write(block)
        left -= block.nbytes
        done(block.nbytes)


class _Report:
    """Adds up what is done."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._progress, self._total, self._done = progress or silent, sum(plan.sizes.values()), 0

    def done(self, what: str, count: int) -> None:
        self._done += count
        self._progress(Step("writing", what, self._done, self._total, BYTES))
