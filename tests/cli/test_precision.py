# SPDX-License-Identifier: Apache-2.0
"""Float types have one vocabulary: every option takes the short names and the long ones."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from lrconvert.cli import cli
from lrconvert.cli._common import Precision
from lrconvert.errors import UsageError
from lrconvert.precision import LONG, long_name, short_name
from lrconvert.targets.gguf.schemes import get_scheme


def options(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Parameter]]:
    context = click.Context(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from options(found, f"{path} {name}")
    for parameter in command.params:
        yield path.strip(), parameter


def test_every_option_takes_both_names() -> None:
    found = {path: parameter for path, parameter in options(cli) if parameter.name == "dtype"}
    assert {"hf", "onnx", "verify", "search", "extend", "eval perplexity", "eval benchmarks"} <= set(found)
    for path, parameter in found.items():
        assert isinstance(parameter.type, Precision), path
        names = [name for name in LONG if name in parameter.type.choices]
        assert {"f32", "bf16"} <= set(names), path
        for name in names:
            assert parameter.type.convert(name, None, None) == parameter.type.convert(LONG[name], None, None) == name
        with pytest.raises(click.BadParameter):
            parameter.type.convert("float8", None, None)


def test_names_and_schemes() -> None:
    for short, long in LONG.items():
        assert short_name(short) == short_name(long) == short and long_name(short) == long_name(long) == long
        assert get_scheme(long) is get_scheme(short) is get_scheme(long.upper())
    assert short_name("int8") == "int8"
    with pytest.raises(UsageError, match="dtype 'int8' is none of f32, bf16, f16, float32"):
        long_name("int8")
