# SPDX-License-Identifier: Apache-2.0
"""The command line: this file wires. Each command has its own file, imported when it runs."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from lrconvert import __version__
from lrconvert.cli._output import hint
from lrconvert.cli._third_parties import hush
from lrconvert.errors import EnvironmentFailure, LrconvertError, UsageError
from lrconvert.shortage import is_shortage, told

# Name: (module under lrconvert.cli, one line of help). A command's module is imported only when it is used.
COMMANDS = {
    "inspect": ("inspect", "Show what a model is, its RoPE, and what it can be converted to."),
    "search": ("search", "Find a recipe's factor sets on your own text."),
    "extend": ("extend", "Fine-tune and search a recipe for a much longer window."),
    "recipe": ("recipe", "Factor sets: list, show, check, derive, import, plot."),
    "hf": ("hf", "Bake a recipe into a Hugging Face folder."),
    "gguf": ("gguf", "Bake a recipe into a GGUF for llama.cpp."),
    "onnx": ("onnx", "Bake a recipe into an ONNX folder."),
    "verify": ("verify", "Compare an artifact with the reference implementation."),
    "eval": ("eval", "Long-text perplexity, retrieval of keys, short benchmarks."),
    "push": ("push", "Publish an artifact on the Hugging Face Hub."),
    "demo": ("demo", "Run the whole path on the embedded model, in about a minute."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"lrconvert.cli.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrconvert")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Bake LongRoPE recipes into checkpoints, and prove that the result computes what they say.

    \b
    MODEL is a folder, a GGUF file, a Hub id, or `demo` for the embedded model.

    \b
    Exit codes: 0 done, 1 our bug, 2 usage, 3 bad input, 4 not supported, 5 parity failed, 6 environment.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # This process is ours and mostly imports: a collector that runs less often and no search for pydantic plugins
    # save a tenth of a short command's time.
    gc.set_threshold(50_000, 20, 20)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    code = run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code. Errors become one line on stderr."""
    debug = "--debug" in arguments
    if odd := [argument for argument in arguments if not _is_utf8(argument)]:
        return _fail(f"{odd[0]!a} is not UTF-8, so no manifest can record it. Rename it", UsageError.exit_code, False)
    hush()
    try:
        result: Any = cli.main(arguments, prog_name="lrconvert", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        return _fail("interrupted", 130, debug)
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since click 8.2
            error.show()
            return error.exit_code
        command = error.ctx.command_path if error.ctx else "lrconvert"
        return _fail(f"{error.format_message().rstrip('.')}. See `{command} --help`", UsageError.exit_code, debug)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code, debug)
    except LrconvertError as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:  # who read has enough
        _let_go()
        return 0
    except SystemExit:  # click leaves like this, where others handle its errors, only for the same
        _let_go()
        return 0
    except OSError as error:  # refused by the machine, and not explained by a command
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EnvironmentFailure.exit_code, debug)
    except Exception as error:
        if is_shortage(error):  # where no command says of what
            return _fail(f"memory ran out: {told(error)}", EnvironmentFailure.exit_code, debug)
        # Anything else is a bug of ours
        line = f"a bug in lrconvert, {type(error).__name__}: {error}. Please report it with the output of --debug"
        return _fail(line, 1, debug)


def _let_go() -> None:
    """Nobody reads any more: what Python still has to write at its end goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # no stream of the system: a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_utf8(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:  # bytes of a file name, as the system passes them on
        return False
    return True


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    hint(f"lrconvert: {' '.join(message.split())}")
    return code
