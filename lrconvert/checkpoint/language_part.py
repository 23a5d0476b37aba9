# SPDX-License-Identifier: Apache-2.0
"""The language model of a larger one, as a checkpoint of its own: a view that leaves the other parts' tensors out.

checkpoint = language_part(open_checkpoint("Phi-4-multimodal"))     # a phi3
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from lrconvert.checkpoint.base import Checkpoint, Encoded
from lrconvert.checkpoint.names import RenamedCheckpoint
from lrconvert.checkpoint.quantised.view import is_quantised
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.families.parts import FLAG, PARTS, LanguagePart, is_larger, language_config


class LanguageCheckpoint(RenamedCheckpoint):
    """Some tensors of a larger model, under the names of a language model. Its weight files are written anew."""

    def __init__(self, base: Checkpoint, part: LanguagePart) -> None:
        self._counts = dict.fromkeys(part.left_out, 0)
        super().__init__(base, dict(self._names_of(base, part)))
        self.touched = base.touched | frozenset(self.tensors)
        self.config = language_config(base.config)
        self.left_out = {pattern: count for pattern, count in self._counts.items() if count}
        self.part_of = {"model_type": base.config["model_type"], "left_out": self.left_out}

    def _names_of(self, base: Checkpoint, part: LanguagePart) -> Iterator[tuple[str, str]]:
        """Ours and the base's, of every tensor that isn't left out; the others are counted."""
        seen: dict[str, str] = {}
        for stored in base.tensors:
            pattern = next((pattern for pattern in part.left_out if fnmatchcase(stored, pattern)), None)
            if pattern is not None:
                self._counts[pattern] += 1
                continue
            front = next((front for front in part.prefixes if stored.startswith(front)), "")
            name = part.prefixes.get(front, "") + stored.removeprefix(front)
            name = name.replace(f"{part.infix}.weight", ".weight") if part.infix else name
            if name in seen:
                raise InputError(f"{base.path}: {seen[name]} and {stored} are the same tensor of the language model")
            seen[name] = stored
            yield name, stored

    def encoded(self, name: str) -> Encoded | None:
        return None


def language_part(checkpoint: Checkpoint, wanted: bool | None = None) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that is to be read, and notes: the language model of a larger one, if that is wanted.

    `wanted`: None takes what there is. Raises `UsageError` where a language model is all that there is, and
    `UnsupportedError` for a larger model of which it isn't wanted, and for one whose weights are quantised.
    """
    if not is_larger(checkpoint.config):
        if wanted:
            raise UsageError(f"{FLAG}: {checkpoint.path} is a language model alone")
        return checkpoint, []
    name = checkpoint.config["model_type"]
    part = PARTS[name]
    if wanted is False:
        others = " and ".join(dict.fromkeys(part.left_out.values()))
        raise UnsupportedError(
            f"{checkpoint.path}: {name} holds more than a language model ({others}), which isn't converted",
            remedy=f"{FLAG} of `hf`, `gguf` and `onnx` converts the language model alone; others take its folder",
        )
    if is_quantised(checkpoint):
        raise UnsupportedError(f"{checkpoint.path}: a quantised {name}; its language model is read from plain weights")
    view = LanguageCheckpoint(checkpoint, part)
    counts = [f"{count} of {part.left_out[pattern]} ({pattern})" for pattern, count in view.left_out.items()]
    kept = f"the language model of a {name}: {len(view.tensors)} tensors"
    return view, [f"{kept}; left out: {', '.join(counts)}" if counts else kept]
