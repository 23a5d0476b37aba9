# SPDX-License-Identifier: Apache-2.0
"""A compiled llama.cpp is found in every layout that it comes in, and nothing is imported for it."""

from __future__ import annotations

import _ctypes
import ctypes
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.runtimes import llama_library
from lrconvert.runtimes.llama_library import VARIABLE, LlamaLibrary, find_library, load


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def folder_of(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def names(library: LlamaLibrary) -> list[str]:
    return [file.name for file in library.files]


LAYOUTS = {
    "plain": (
        ["libllama.so", "libggml.so", "libggml-cpu.so", "libggml-base.so", "libmtmd.so", "libllama-common.so"],
        ["libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so"],
    ),
    "versions behind the suffix": (
        ["libllama.so.0", "libllama.so", "libggml.so.0", "libggml-base.so.0", "libggml-cpu.so", "libggml-cuda.so.0"],
        ["libggml-base.so.0", "libggml-cpu.so", "libggml-cuda.so.0", "libggml.so.0", "libllama.so"],
    ),
    # These load a variant themselves, the one that fits the machine: another's code may not even run here.
    "versions before it, variants": (
        ["libllama.v0.5.0.so", "libggml.v0.5.0.so", "libggml-base.so", "libggml-cpu-x64.so", "libggml-cpu-zen4.so"],
        ["libggml-base.so", "libggml.v0.5.0.so", "libllama.v0.5.0.so"],
    ),
    "macOS": (
        ["libllama.0.5.0.dylib", "libllama.dylib", "libggml.dylib", "libggml-base.0.dylib", "libggml-metal.dylib"],
        ["libggml-base.0.dylib", "libggml-metal.dylib", "libggml.dylib", "libllama.dylib"],
    ),
    "Windows": (
        ["llama.dll", "ggml.dll", "ggml-cpu.dll", "ggml-base.dll"],
        ["ggml-base.dll", "ggml-cpu.dll", "ggml.dll", "llama.dll"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_come_in_the_order_in_which_they_depend_on_each_other(tmp_path: Path, layout: str) -> None:
    """Base, backends, ggml, llama; other libraries stay out; one file of those that are one library."""
    given, expected = LAYOUTS[layout]
    library = find_library(folder_of(tmp_path / "lib", given))
    assert names(library) == expected
    assert library.name == str(tmp_path / "lib")


def test_a_file_stands_for_its_folder(tmp_path: Path) -> None:
    """libllama as named, its companions beside it; a library that stands alone has everything in it."""
    folder = folder_of(tmp_path / "lib", ["libllama.so", "libllama.so.0", "libggml.so", "libggml-base.so"])
    assert names(find_library(folder / "libllama.so.0")) == ["libggml-base.so", "libggml.so", "libllama.so.0"]
    assert names(find_library(folder / "libggml.so")) == ["libggml-base.so", "libggml.so", "libllama.so"]
    alone = folder_of(tmp_path / "alone", ["libllama.so", "other.abi3.so"])
    assert names(find_library(alone / "libllama.so")) == ["libllama.so"]
    assert names(find_library(str(alone / "other.abi3.so"))) == ["other.abi3.so"]


def test_a_path_without_a_library_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    """What is not there is named, file by file."""
    with pytest.raises(InputError, match=r"holds no libggml-base, libggml, libllama \(\.so, "):
        find_library(tmp_path)
    with pytest.raises(InputError, match=r"half holds no libggml-base \(\.so, "):
        find_library(folder_of(tmp_path / "half", ["libllama.so", "libggml.so"]))
    with pytest.raises(InputError, match="nowhere does not exist"):
        find_library(tmp_path / "nowhere")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf is not a shared library"):
        find_library(tmp_path / "model.gguf")


def install(site: Path, module: str, distribution: str, version: str, files: Iterable[str]) -> None:
    """A package that must not be imported."""
    folder_of(site / module, [])
    (site / module / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in files:
        folder_of((site / module / name).parent, [Path(name).name])
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def test_installed_packages_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python before xllamacpp; an argument before the variable, the variable before both."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    install(site, "xllamacpp", "xllamacpp", "1.2", ["xllamacpp.abi3.so"])
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    assert find_library() == LlamaLibrary("xllamacpp 1.2", (site / "xllamacpp/xllamacpp.abi3.so",))

    libraries = [f"lib/lib{stem}.so" for stem in ("llama", "ggml", "ggml-base", "ggml-cpu")]
    install(site, "llama_cpp", "llama-cpp-python", "0.3.36", libraries)
    importlib.invalidate_caches()
    found = find_library()
    assert found.name == "llama-cpp-python 0.3.36"
    assert found.files[-1] == site / "llama_cpp/lib/libllama.so" and len(found.files) == 4

    named = folder_of(tmp_path / "named", ["libllama.so", "libggml.so", "libggml-base.so"])
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_library().name == str(named)
    argument = folder_of(tmp_path / "argument", ["libllama.so", "libggml.so", "libggml-base.so"])
    assert find_library(argument).name == str(argument)


def test_a_package_without_its_library_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of llama-cpp-python that has lost its libraries does not hide xllamacpp; a folder that only
    has the name of a package is none."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    install(site, "llama_cpp", "llama-cpp-python", "0.3.36", [])
    install(site, "xllamacpp", "xllamacpp", "1.2", ["xllamacpp.pyd"])
    importlib.invalidate_caches()
    assert find_library().name == "xllamacpp 1.2"
    monkeypatch.setattr(llama_library.metadata, "version", raising_not_found)
    with pytest.raises(EnvironmentFailure, match=r"needs llama\.cpp"):
        find_library()


def raising_not_found(name: str) -> str:
    raise llama_library.metadata.PackageNotFoundError(name)


def test_without_any_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6 and what to install."""
    monkeypatch.setattr(llama_library, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailure) as raised:
        find_library()
    assert raised.value.exit_code == 6
    assert "neither llama-cpp-python nor xllamacpp is installed" in str(raised.value)
    assert "pip install 'lrconvert[llama]'" in str(raised.value)


def test_a_library_that_does_not_load_is_the_machines_matter(tmp_path: Path) -> None:
    """As a CUDA build without CUDA: the loader's own words."""
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    with pytest.raises(EnvironmentFailure, match=r"libllama\.so can't be loaded: "):
        load(find_library(tmp_path / "libllama.so"))


def test_ggml_quantises_in_this_process() -> None:
    """Functions are found by name and compute: Q8_0 as gguf-py makes it. What isn't there is an AttributeError."""
    try:
        library = find_library()
    except EnvironmentFailure as failure:
        pytest.skip(str(failure))
    functions = load(library)
    chunk = functions.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int32, pointer, pointer, number, number, number, pointer]
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = quantize(values, kind)
    made = np.zeros_like(expected)
    size = chunk(kind, values.ctypes.data, made.ctypes.data, 0, 4, 64, None)
    assert size == expected.nbytes
    np.testing.assert_array_equal(made, expected)
    with pytest.raises(AttributeError, match="ggml_no_such_function"):
        _ = functions.ggml_no_such_function
    assert load(library) is functions


def test_a_shared_library_of_something_else_has_no_such_functions() -> None:
    """Any library loads; that it isn't llama.cpp shows where a function is asked for."""
    with pytest.raises(AttributeError, match="ggml_quantize_chunk"):
        _ = load(find_library(_ctypes.__file__)).ggml_quantize_chunk
