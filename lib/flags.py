"""Command-line flags from data classes, and user errors: one line on stderr, exit status 2."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from tqdm import tqdm

Config = TypeVar("Config")


def print_error(message: str) -> None:
    """Print one line on stderr without tearing a progress bar apart."""
    # Ctrl-C may have closed the pipe, or may interrupt another line that is being written.
    with contextlib.suppress(OSError, RuntimeError):
        script = os.path.basename(sys.argv[0])
        tqdm.write(f"{script}: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print a one-line error and exit with status 2. For user errors."""
    print_error(message)
    raise SystemExit(2)


def require(condition: bool, message: str) -> None:
    """Exit with the message unless the condition holds."""
    if not condition:
        fail(message)


def require_min(config, **minima: float) -> None:
    """Refuse flags below their minimum, and NaN. None means that a flag was not given."""
    for name, low in minima.items():
        value = getattr(config, name)
        message = f"{flag_name(name)} must be at least {low}, not {value}"
        require(value is None or value >= low, message)


def set_missing(config, defaults: dict) -> None:
    """Set the fields that are None, which flags have not set, to these defaults."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def require_writable(json_file: str, plot: str) -> None:
    """Refuse --json and --plot files that cannot be written, before any work is done."""
    for name in filter(None, (json_file, plot)):
        place = os.path.realpath(name)
        to_write = place if os.path.exists(place) else os.path.dirname(place)
        writable = os.access(to_write, os.W_OK) and not os.path.isdir(place)
        sound = writable and not os.path.islink(place) and len(os.path.basename(place)) < 256
        require(sound, f"{name} is a folder, or its folder is missing or read-only")
    require(not plot or plot.endswith(".png"), "plots are PNG: give a name that ends in .png")


def is_alone() -> bool:
    """Whether this is one process, whatever rank something has left in the environment."""
    return os.environ.get("WORLD_SIZE", "") in ("", "1")


def warn(message: str) -> None:
    """Print a line on stderr, from rank 0 only."""
    if is_alone() or os.environ.get("RANK") == "0":
        print_error(message)


@contextlib.contextmanager
def quiet_pipes():
    """End without a word, as `cat` does, where the reader of a pipe has gone: `... | head -1`."""
    try:
        yield
        if sys.stdout:  # python ... >&- has none
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left to flush
        raise SystemExit(128 + signal.SIGPIPE) from None


@contextlib.contextmanager
def user_errors(at: str = ""):
    """Turn a ValueError or OSError that says what is wrong into a user error, `at` before it."""
    try:
        yield
    except BrokenPipeError:  # quiet_pipes
        raise
    except (ValueError, OSError) as error:
        fail(f"{at}{error}")


def parse_json(path: Path) -> dict:
    """Read a file that holds one JSON object. Raises ValueError if it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return value


def parse_json_lines(path: Path, content: bytes) -> list[tuple[int, dict]]:
    """Parse a file's content, a JSON object in each line that is not empty, and number its lines.

    Raises ValueError with the first line that is something else.
    """
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: this is no JSON object: {error}") from None
        if not isinstance(row, dict | None):
            raise ValueError(f"{path}, line {number}: this is no JSON object")
        rows += [] if row is None else [(number, row)]
    return rows


def read_json(path: Path) -> dict:
    """Read a file that holds one JSON object, or exit."""
    with user_errors():
        return parse_json(path)


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def parse_flags(config_class: type[Config], description: str, positional: str = "") -> Config:
    """Parse the command line into a data class: one flag a field, its type from the annotation.

    The comment on a field's line is its help. A line that holds only a comment is the heading of
    the fields below it. The field named `positional` takes the arguments that are not flags.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    group = parser = _Parser(description=description, formatter_class=formatter)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    kinds, source = typing.get_type_hints(config_class), inspect.getsource(config_class)
    line = re.compile(r"^    (?:# (.+)|(\w+):[^#\n]*(?:#\s*(.*))?)$", re.M)
    for heading, name, comment in line.findall(source):
        if heading:
            group = parser.add_argument_group(heading)
        elif name == positional:
            parser.add_argument(name, nargs="*", metavar=name.upper(), help=comment)
        elif name in defaults:
            options = flag_options(kinds[name], defaults[name], comment)
            group.add_argument(flag_name(name), default=defaults[name], **options)
    return config_class(**vars(parser.parse_args()))


def flag_options(kind, default, comment: str) -> dict:
    """Return argparse's options for a flag of a type, with its default shown in the help."""
    if isinstance(kind, types.UnionType):  # `int | None`
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    hidden = default is None or default is False or default == "" or "[" in comment
    options = {"help": (comment if hidden else f"{comment} [{default}]").replace("%", "%%")}
    if kind is bool:
        return options | {"action": "store_true"}
    if typing.get_origin(kind) is Literal:
        return options | {"choices": typing.get_args(kind)}
    return options | {"type": kind}
