"""What a script says to the person who runs it: errors of one line, progress, tables.

Progress and errors go to stderr, results to stdout, so that `python evaluate.py runs/demo > scores.txt` stays clean.
"""

import argparse
import errno
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

PLAIN_LINE_SECONDS = 30  # without a terminal: at most one progress line in this time


class UserError(Exception):
    """Something the user can fix. The message says what was expected, what came, where, and what to do."""


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


class Progress:
    """A bar on a terminal; elsewhere (log file, batch queue) a plain line now and then.

    >>> with Progress("filter", total=240, unit="tile") as progress:
    ...     progress.advance(note="loss 0.51")
    """

    def __init__(self, title: str, total: int, unit: str = "it"):
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True,
                        file=sys.stderr, disable=not sys.stderr.isatty())

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if not self.bar.disable:
            self.bar.set_description(self.title, refresh=False)
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(steps)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.started)
            print(f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s {note}".rstrip(),
                  file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    widths = [max(len(cells[i]) for cells in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *aligned[1:]]).rstrip()

    return "\n".join(line(cells) for cells in [header, *rows])


def percent(share: float) -> str:
    """A share with one decimal, a tiny one with two digits: 12.3%, 0.042%, 6.1e-11%."""
    return f"{share:.1%}" if not 0 < abs(share) < 0.01 else f"{100 * share:.2g}%"


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def command(*words: str) -> str:
    """The words as one line to paste into the shell: sh and its kin, on Windows cmd and PowerShell."""
    if os.name != "nt":
        return shlex.join(words)
    return " ".join(word if re.fullmatch(r"[\w.:=,+/\\-]+", word) else f'"{word}"' for word in words)


def argument_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of a script, whose help is the script's docstring; `run` looks at --traceback."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, **options)
    parser.add_argument("--traceback", action="store_true", help="on an error show where in the code it arose")
    return parser


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; end with exit code 2 and one line where the user can fix the cause, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that this console cannot show must not end hours of work
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        _flush_output()
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        where, message = "", error
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else "printing: " if _output_is_full(error) else ""
            message = error.strerror or error
        if "--traceback" in sys.argv:
            traceback.print_exception(error)
        print(f"error: {where}{message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{'; ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        sys.exit(130)


def _flush_output() -> None:
    """Notice here, not after the end, what became of what was printed."""
    if sys.stdout:  # closed, or there is none: pythonw on Windows
        sys.stdout.flush()


def _output_is_full(error: OSError) -> bool:
    """Whether it is what we print that cannot be written; Python then fails once more when it ends, unless silenced."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None and bool(sys.stdout)
    if full:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return full
