# SPDX-License-Identifier: Apache-2.0
"""Values as JSON has them, changed by their structure, and written down: also as what JSON does not allow.

tree = damage(rng, json.loads(text))
written = dumps(tree)
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Tree = Any  # of dict, list, str, int, float, bool, None, and the two below


class Raw(str):
    """Text that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object as pairs: its keys may repeat."""


DEEP = 3000  # levels: far beyond what any reader follows
NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 64, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64),
    *(-1, -2, -(2**31), -(2**63), -(2**63) - 1, 10**30, -(10**30), Raw("9" * 5000), Raw("1" + "0" * 310)),
    *(0.5, 1.0, -0.0, -1.5, 1e-300, 5e-324, 1e38, 3.5e38, 1e308, -1e308, 1 + 2**-52, Raw("1e999"), Raw("-1e999")),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e5"), Raw("-0"), Raw("00"), Raw("1."), Raw("0x10")),
)
STRINGS: tuple[Any, ...] = (
    *("", " ", "\0", "a\0b", "\n", "a\r\nb", "\t", "\x1b[31m", "\u202eabc", "e\u0301", "\ufeff", "\U0010ffff", "None"),
    *("NaN", "true", "0", "-1", "1e999", "%s%n", "{0.__class__}", "{{ 7*7 }}", "[bold]x", "[/]", "[link=x]", "(.*)*$"),
    *("(a+)+$", "[", "\\", "a" * 300, "a" * 5000, "../outside/secret.txt", "../../etc/passwd", "/etc/passwd", "/", "."),
    *("..", "a/../b", "./config.json", "a//b", "a\\b", "C:\\x", "\\\\host\\x", "file:///etc/passwd", "~", "$HOME"),
    *("me/../x", "-", "--force", "lrconvert.json", "config.json", "model.safetensors", "README.md", "auto", "cuda"),
    *(Raw(r'"\ud800"'), Raw(r'"\udc80\ud800"'), Raw(r'"\u0000"'), Raw('"\x01"'), Raw('"\\x"'), Raw("'x'"), Raw("x")),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [0] * 1000, [{}] * 50, ["x", 1, None]),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("[" * DEEP), Raw("{"), Raw("")),
)


def value(rng: random.Random) -> Tree:
    """Any value that a careless or a hostile writer puts somewhere."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS))))


Place = tuple[Any, Any]  # a dict or a list, and a key of it


def place(rng: random.Random, tree: Tree) -> Place | None:
    """A place in a tree, found from its top: what lies higher is met more often than its share."""
    found: Place | None = None
    while isinstance(tree, dict | list) and not isinstance(tree, Pairs) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        found, tree = (tree, key), tree[key]
        if rng.random() < 0.3:
            break
    return found


def _replace(rng: random.Random, tree: Tree, at: Place) -> None:
    at[0][at[1]] = value(rng)


def _near(rng: random.Random, tree: Tree, at: Place) -> None:
    """Another value of the same type, or the same value of another."""
    old = at[0][at[1]]
    if isinstance(old, bool) or old is None:
        new: Any = rng.choice((not old, str(old), int(bool(old))))
    elif isinstance(old, int | float):
        some = (old + 1, old - 1, -old, old * 2, old / 2, float(old), str(old), [old], old + 0.5, *NUMBERS)
        new = rng.choice(some)
    elif isinstance(old, str):
        cut = rng.randrange(len(old) + 1)
        some = (old[:cut], old + old, old[:cut] + rng.choice("\0\n/.\u202e") + old[cut:], old.upper(), old[::-1])
        new = rng.choice((*some, *STRINGS))
    else:
        new = [old] if rng.random() < 0.5 else {"a": old}
    at[0][at[1]] = new


def _remove(rng: random.Random, tree: Tree, at: Place) -> None:
    del at[0][at[1]]


def _rename(rng: random.Random, tree: Tree, at: Place) -> None:
    if isinstance(at[0], dict):
        name = rng.choice([*STRINGS, str(at[1]).upper(), f"{at[1]}_"])
        at[0][name if not isinstance(name, Raw) else "\ud800"] = at[0].pop(at[1])


def _add(rng: random.Random, tree: Tree, at: Place) -> None:
    if isinstance(at[0], dict):
        at[0][str(rng.choice(STRINGS))] = value(rng)
    else:
        at[0].insert(at[1], value(rng))


def _graft(rng: random.Random, tree: Tree, at: Place) -> None:
    """What lies elsewhere in the same file."""
    other = place(rng, tree)
    if other is not None and at[1] in (at[0] if isinstance(at[0], dict) else range(len(at[0]))):
        copied = json.loads(dumps(other[0][other[1]])) if not _holds_raw(other[0][other[1]]) else None
        at[0][at[1]] = copied


def _repeat(rng: random.Random, tree: Tree, at: Place) -> None:
    """A key twice, with another value first or last; an item many times."""
    if isinstance(at[0], dict):
        pairs = Pairs(at[0].items())
        pairs.insert(rng.randrange(len(pairs) + 1), (at[1], value(rng)))
        at[0].clear()
        at[0][_PAIRS] = pairs
    else:
        at[0][at[1] : at[1]] = [at[0][at[1]]] * rng.choice((1, 2, 1000))


def _reorder(rng: random.Random, tree: Tree, at: Place) -> None:
    if isinstance(at[0], list):
        rng.shuffle(at[0])
    else:
        items = list(at[0].items())
        rng.shuffle(items)
        at[0].clear()
        at[0].update(items)


def _cut(rng: random.Random, tree: Tree, at: Place) -> None:
    if isinstance(at[0], list):
        del at[0][rng.randrange(len(at[0])) :]
    else:
        at[0].clear()


_PAIRS = "\0pairs"  # a dict with this key alone is written as the pairs it holds
INJURIES: tuple[Callable[[random.Random, Tree, Place], None], ...] = (
    *(_replace, _replace, _replace, _near, _near, _near, _remove, _rename, _add, _graft, _repeat, _reorder, _cut),
)


def damage(rng: random.Random, tree: Tree) -> Tree:
    """The tree with one to three injuries, in place; rarely another altogether."""
    if rng.random() < 0.01:
        return value(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if (at := place(rng, tree)) is not None and _PAIRS not in at[0]:
            rng.choice(INJURIES)(rng, tree, at)
    return tree


def _holds_raw(tree: Tree) -> bool:
    if isinstance(tree, dict):
        return _PAIRS in tree or any(_holds_raw(item) for item in tree.values())
    return isinstance(tree, Raw) or (isinstance(tree, list) and any(_holds_raw(item) for item in tree))


# --- written down ----------------------------------------------------------------------------------------


def dumps(tree: Tree, between: str = ": ") -> str:
    """JSON, but for what `Raw` and `Pairs` say; `between` stands between key and value."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        items = tree[_PAIRS] if _PAIRS in tree else tree.items()
        return "{" + ", ".join(f"{json.dumps(str(key))}{between}{dumps(item, between)}" for key, item in items) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(dumps(item, between) for item in tree) + "]"
    return json.dumps(tree)


TOML_VALUES = (Raw("nan"), Raw("-inf"), Raw("1979-05-27"), Raw("07:32:00"), Raw("1979-05-27T07:32:00Z"), Raw("0xff"),
               Raw("1_000"), Raw("'''x'''"), Raw("[[[1]]]"), Raw("+1"), Raw("0o7"), Raw('"\\U00110000"'))  # fmt: skip


def toml(tree: Tree) -> str:
    """A document whose lists of tables are tables of their own; everything inside them is written in one line."""
    if not isinstance(tree, dict):
        return dumps(tree)
    lines, tables = [], []
    for key, item in tree.items():
        if isinstance(item, list) and item and all(isinstance(each, dict) and _PAIRS not in each for each in item):
            for each in item:
                tables += [f"[[{json.dumps(str(key))}]]", *_toml_lines(each)]
        else:
            lines += _toml_lines(item if key == _PAIRS else {key: item})
    return "\n".join([*lines, *tables]) + "\n"


def _toml_lines(table: Any) -> list[str]:
    items = table.items() if isinstance(table, dict) else table
    return [f"{json.dumps(str(key))} = {dumps(item, ' = ')}" for key, item in items]
