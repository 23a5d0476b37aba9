# SPDX-License-Identifier: Apache-2.0
"""The keys of a `quantization_config`, checked as they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrconvert.errors import InputError, UnsupportedError

_PAIR = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})")


@dataclass(frozen=True)
class Settings:
    """A section of config.json. `key`: where it stands there."""

    values: Mapping[str, Any]
    key: str = "quantization_config"

    def where(self, name: str) -> str:
        return f"config.json: {self.key}.{name}"

    def stated(self, *names: str) -> tuple[str, Any]:
        """The first of the names that has a value, and the value; the first name and None where none has."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        return name, self.values.get(name)

    def number(self, *names: str, known: Sequence[int] = (), default: int | None = None) -> int:
        """A whole number under one of the names. Raises `InputError` where it is missing or none, and
        `UnsupportedError` where it isn't one of the `known`."""
        name, value = self.stated(*names)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.where(name)} is {value!r:.60}; a whole number is needed")
        if known and value not in known:
            raise UnsupportedError(
                f"{self.where(name)} is {value}; {', '.join(map(str, known))} can be read",
                remedy="Convert the unquantised checkpoint",
            )
        return value

    def group_size(self, *names: str) -> int | None:
        """Columns that share a scale; None for all of them."""
        found = self.number(*names, default=-1)
        if found != -1 and found < 1:
            raise InputError(f"{self.where(names[0])} is {found}; -1 or more than 0 is needed")
        return None if found == -1 else found

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.where(name)} is {value!r:.60}; true or false is needed")
        return value

    def pair(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of a block; None where nothing is stated."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, str) and (sides := _PAIR.fullmatch(value)):  # in older files
            return int(sides[1]), int(sides[2])
        if isinstance(value, list) and len(value) == 2 and all(type(item) is int and item > 0 for item in value):
            return value[0], value[1]
        raise InputError(f"{self.where(name)} is {value!r:.60}; two whole numbers are needed")

    def one_of(self, known: Sequence[str], *names: str, default: str) -> str:
        """A word under one of the names. Raises `UnsupportedError`, by name, for others than the `known`."""
        name, value = self.stated(*names)
        word = default if value is None else str(value).lower()
        if word not in known:
            raise UnsupportedError(
                f"{self.where(name)} is {value!r:.60}; {', '.join(known)} can be read",
                remedy="Convert the unquantised checkpoint",
            )
        return word

    def refuse(self, *names: str) -> None:
        """`UnsupportedError` for keys whose meaning isn't known here, where they are set."""
        if found := [name for name in names if self.values.get(name)]:
            raise UnsupportedError(
                f"{self.where(found[0])} is {self.values[found[0]]!r:.60}, which can't be read",
                remedy="Convert the unquantised checkpoint",
            )

    def inner(self, name: str) -> Settings | None:
        """A section inside; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where(name)} is {value!r:.60}; a section is needed")
        return Settings(value, f"{self.key}.{name}")
