"""How every script ends: wrong input is reported in one line with exit status 1, without a traceback or a token."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError


# Raised for wrong input by the scripts and by the libraries that they call. Anything else is a bug.
EXPECTED = (OSError, ValueError, ImportError, StrictDataclassError)


class ArgumentParser(argparse.ArgumentParser):
    """`argparse`'s parser, whose errors do not repeat the values of unknown options: they may be tokens."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            self.error(unknown_options(left))
        return parsed


def unknown_options(left: Iterable[str]) -> str:
    """The error message for arguments that no parser took."""
    found = [match[0] for match in (re.match(r"--?[A-Za-z][\w-]*", text) for text in left) if match]
    return f"Options must be those that --help lists; {', '.join(found) or 'a value without an option'} is not among them."


def require(options: Any, name: str, allowed: Callable[[Any], bool], words: str) -> None:
    """Checks an option that was given, one that is not None.

    Args:
        options: what has it as an attribute.
        name: of the option.
        allowed: whether a value may be.
        words: what values may be.

    Raises:
        ValueError: for another value.
    """
    value = getattr(options, name)
    if value is not None and not allowed(value):
        raise ValueError(f"`{name}` must be {words}, got {value}.")


def require_least(options: Any, **least: int) -> None:
    """Checks that options that were given are no smaller than these numbers; errors as `require`."""
    for name, number in least.items():
        require(options, name, lambda value, number=number: value >= number, f"an integer of at least {number}")


def run_command(
    main: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None = None,
    explain: Callable[[BaseException], str] = str,
    expected: tuple[type[BaseException], ...] = EXPECTED,
) -> NoReturn:
    """Runs a script and exits. `python -X dev` raises errors as they are.

    Args:
        main: takes the command line, and returns the exit status if it is not 0.
        arguments: the command line, by default that of the process.
        explain: turns an error into a message.
        expected: the errors to report in one line.
    """
    try:
        status = main(list(sys.argv[1:] if arguments is None else arguments))
    except expected as error:
        if sys.flags.dev_mode:
            raise
        words = " ".join(explain(error).split()) or type(error).__name__
        token = get_token()
        print(f"error: {words.replace(token, '…') if token else words}", file=sys.stderr)
        status = 1
    sys.exit(status)
