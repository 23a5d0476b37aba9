# SPDX-License-Identifier: Apache-2.0
"""Finds a compiled llama.cpp on the machine, without importing the packages that carry one."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrconvert.errors import EnvironmentFailure, InputError

VARIABLE = "LRCONVERT_LLAMA_LIBRARY"
REMEDY = f"pip install 'lrconvert[llama]', or name a folder that holds libllama in {VARIABLE}"

# libllama.so, libggml-base.so.0, libllama.v0.5.0.so, libggml.0.9.4.dylib, ggml-cpu.dll
_NAME = re.compile(r"(?:lib)?(?P<stem>llama|ggml(?:-[\w-]+)?)(?:\.v?\d[\d.]*)?\.(?:so|dylib|dll)(?:\.\d+)*")
_SHARED = re.compile(r"\.(?:so|dylib|dll|pyd)(?:\.\d+)*$")
_NEEDED = ("ggml-base", "ggml", "llama")


@dataclass(frozen=True)
class LlamaLibrary:
    """A compiled llama.cpp: `files` are loaded in this order, `name` is what a report calls it."""

    name: str
    files: tuple[Path, ...]


def find_library(path: str | Path | None = None) -> LlamaLibrary:
    """The library at `path` (a file, or a folder that holds libllama and libggml), else the one that the environment
    variable names, else the one that an installed llama-cpp-python or xllamacpp carries.

    `InputError` when a path that was given holds none, `EnvironmentFailure` when there is none at all.
    """
    if given := path or os.environ.get(VARIABLE):
        return _at(Path(given), str(given))
    found = _of_llama_cpp_python() or _of_xllamacpp()
    if found is None:
        raise EnvironmentFailure(
            "this needs llama.cpp, and neither llama-cpp-python nor xllamacpp is installed", remedy=REMEDY
        )
    return found


@functools.cache
def load(library: LlamaLibrary) -> Any:
    """The functions of llama.cpp and ggml as attributes, in this process; their types are the caller's to set.

    `EnvironmentFailure` when the files can't be loaded here, as a CUDA build on a machine without CUDA.
    """
    return _Functions(library)


class _Functions:
    """Looks a function up in all files: only on Linux and macOS does a library also answer for what it depends on."""

    def __init__(self, library: LlamaLibrary) -> None:
        if sys.platform == "win32":
            os.add_dll_directory(str(library.files[0].parent))
        try:
            # Not RTLD_GLOBAL: a wheel's symbols (its Rust and C++ runtimes) would be offered to torch as well.
            self._loaded = [ctypes.CDLL(str(file)) for file in library.files]
        except OSError as error:
            raise EnvironmentFailure(f"{library.name} can't be loaded: {error}", remedy=REMEDY) from error

    def __getattr__(self, name: str) -> Any:
        for loaded in reversed(self._loaded):
            if hasattr(loaded, name):
                return getattr(loaded, name)
        raise AttributeError(name)


# --- where a library lies --------------------------------------------------------------------------------


def _at(path: Path, name: str) -> LlamaLibrary:
    path = path.expanduser().absolute()
    if path.is_dir():
        return LlamaLibrary(name, _files_of(path))
    if not path.is_file() or not _SHARED.search(path.name):
        what = "is not a shared library" if path.is_file() else "does not exist"
        raise InputError(f"{path} {what}; a folder that holds libllama and libggml, or libllama itself, is needed")
    matched = _NAME.fullmatch(path.name)
    if matched and "ggml-base" in _by_stem(path.parent):
        return LlamaLibrary(name, _files_of(path.parent, path if matched["stem"] == "llama" else None))
    return LlamaLibrary(name, (path,))  # one file with everything in it


def _files_of(folder: Path, llama: Path | None = None) -> tuple[Path, ...]:
    """The files of a folder, each after those it depends on: base, backends, ggml, llama.

    A build that brings its CPU code in variants loads its backends itself, by the machine it meets: they stay out.
    """
    found = _by_stem(folder)
    if llama is not None:
        found["llama"] = llama
    if missing := [stem for stem in _NEEDED if stem not in found]:
        names = ", ".join(f"lib{stem}" for stem in missing)
        raise InputError(f"{folder} holds no {names} (.so, .dylib or .dll); llama.cpp's shared libraries are needed")
    backends = sorted(stem for stem in found if stem.startswith("ggml-") and stem != "ggml-base")
    if any(stem.startswith("ggml-cpu-") for stem in backends):
        backends = []
    return tuple(found[stem] for stem in ("ggml-base", *backends, "ggml", "llama"))


def _by_stem(folder: Path) -> dict[str, Path]:
    """llama.cpp's libraries in a folder. Of several names for one (libllama.so, libllama.so.0) the shortest."""
    found: dict[str, Path] = {}
    for file in sorted(_files(folder), key=lambda file: (len(file.name), file.name), reverse=True):
        if matched := _NAME.fullmatch(file.name):
            found[matched["stem"]] = file
    return found


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.iterdir() if file.is_file())


def _installed(module: str, distribution: str) -> tuple[str, Path] | None:
    """Name with version, and folder, of a package: looked up, not imported (importing would load its llama.cpp)."""
    spec = find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    try:
        return (f"{distribution} {metadata.version(distribution)}", Path(places[0])) if places else None
    except metadata.PackageNotFoundError:  # a folder that happens to have the name
        return None


def _of_llama_cpp_python() -> LlamaLibrary | None:
    if (found := _installed("llama_cpp", "llama-cpp-python")) is None:
        return None
    name, folder = found[0], found[1] / "lib"
    return LlamaLibrary(name, _files_of(folder)) if folder.is_dir() and "llama" in _by_stem(folder) else None


def _of_xllamacpp() -> LlamaLibrary | None:
    """Its one extension module exports all of llama.cpp and ggml."""
    if (found := _installed("xllamacpp", "xllamacpp")) is None:
        return None
    name, folder = found
    modules = sorted([*folder.glob("xllamacpp*.so"), *folder.glob("xllamacpp*.pyd")])
    return LlamaLibrary(name, (modules[0],)) if modules else None
