# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder with safetensors: one file, or shards and their index.

The safetensors library checks the headers (size, JSON, offsets that tile the file); what it can't know, that
index and shards agree, is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from lrconvert.checkpoint.base import Checkpoint, TensorInfo, read_json
from lrconvert.checkpoint.blocks import Block
from lrconvert.checkpoint.links import check_links
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.errors import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Files beside config and weights that make a model usable: patterns of `fnmatch`, in any case.
SIDE_FILES = (
    "tokenizer*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class FolderCheckpoint(Checkpoint):
    """Safetensors in a folder. Raises `InputError` for anything that isn't whole and consistent."""

    format = "safetensors"
    native = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        # One whole file wins over an index beside it, as in transformers.
        sharded = (path / INDEX).exists() and not (path / SINGLE).is_file()
        self._weight_map = self._read_index() if sharded else None
        self._files: dict[Path, TensorFile] = {}

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path}: weight_map is missing or empty; tensor names to shard names are needed")
        problems = []
        for shard in sorted({str(value) for value in weight_map.values()}):
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                problems.append(f"{shard!r} is not the plain name of a .safetensors file in the folder")
            elif not (self.path / shard).is_file():
                problems.append(f"{shard} is listed here but is not in the folder")
        if problems:
            raise InputError.collect(path, problems)
        return {name: str(shard) for name, shard in weight_map.items()}

    @cached_property
    def shards(self) -> list[Path]:
        """The weight files, sorted by name."""
        if self._weight_map is not None:
            return [self.path / name for name in sorted(set(self._weight_map.values()))]
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if found:
            names = ", ".join(path.name for path in found)
            raise InputError(f"{self.path}: several weight files and no {INDEX}: {names}")
        pickles = sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise InputError(
                f"{self.path}: weights only as pickles ({', '.join(pickles)}), which can run code when "
                "loaded and are never opened",
                remedy="Save the model as safetensors first",
            )
        raise InputError(f"{self.path}: no weights: neither {SINGLE} nor {INDEX}")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:  # type: ignore[override]
        """Every tensor, in file order. Opening the shards checks their headers."""
        found: dict[str, TensorInfo] = {}
        problems = []
        for shard in self.shards:
            for name, info in self._file(shard).tensors.items():
                if name in found:
                    problems.append(f"{name} is in {found[name].file.name} and in {shard.name}")
                found[name] = info
        if self._weight_map is not None:
            for name, shard in self._weight_map.items():
                if name not in found:
                    problems.append(f"{name} is in the index but not in {shard}")
                elif found[name].file.name != shard:
                    problems.append(f"{name} is in {found[name].file.name}, the index says {shard}")
            problems += [f"{name} is not in the index" for name in found if name not in self._weight_map]
        if problems:
            raise InputError.collect(self.path, problems)
        return found

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor: for who reads other dtypes than floats, or other parts than blocks."""
        return self._file(self.tensors[name].file)

    def _file(self, shard: Path) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(shard)
        return self._files[shard]

    def blocks(self, name: str) -> Iterator[Block]:
        return self.file_of(name).blocks(name)

    def weight_files(self) -> list[Path]:
        index = [self.path / INDEX] if self._weight_map is not None else []
        return [*index, *self.shards]

    def side_files(self) -> dict[str, Path | bytes]:
        return side_files_of(self.path)


def side_files_of(folder: Path) -> dict[str, Path | bytes]:
    """What a folder holds of `SIDE_FILES`, by name: plain files, no pipes and no devices.

    They are copied as they are, so links out of the folder are not followed: `InputError` that names them.
    """
    found = {path.relative_to(folder).as_posix(): path for path in sorted([*folder.iterdir(), *_templates(folder)])}
    wanted = {name for pattern in SIDE_FILES for name in found if fnmatchcase(name.lower(), pattern)}
    files = {name: path for name, path in found.items() if name in wanted and (path.is_file() or path.is_symlink())}
    check_links(folder, files.values())
    return {name: path for name, path in files.items() if path.is_file()}


def _templates(folder: Path) -> list[Path]:
    """Chat templates in their folder, which may be a link as little as they."""
    inner = folder / "additional_chat_templates"
    check_links(folder, [inner] if inner.is_symlink() else [])
    return list(folder.glob(f"{inner.name}/*"))
