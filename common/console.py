"""Everything that a script prints: errors of one line, warnings, progress, tables.

Progress and errors go to stderr, results to stdout, so that `python evaluate.py runs/demo > scores.txt` stays clean.
"""

import argparse
import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # of progress, if stderr is not a terminal
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # schedulers end jobs so

_speaker = ""  # who says an error, if this process is one of several
_code = 130  # of an interrupt


class UserError(Exception):
    """A problem that the user can fix. The message says what was expected, what came, where, and what to do."""


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with the message if the condition is false."""
    if not condition:
        raise UserError(message)


class Progress(AbstractContextManager):
    """A progress bar on a terminal; elsewhere (log file, batch queue) a plain line now and then.

    >>> with Progress("filter", total=240, unit="tile") as progress:
    ...     progress.advance(note="loss 0.51")
    """

    def __init__(self, title: str, total: int, unit: str = "it"):
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True,
                        file=sys.stderr, disable=bool(_speaker) or not sys.stderr.isatty())

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if not self.bar.disable:
            self.bar.set_description(self.title, refresh=False)
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(steps)
        elif not _speaker and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.started)
            print(f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s {note}".rstrip(),
                  file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        self.bar.close()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column aligned to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as plain text: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def percent(share: float) -> str:
    """Return a share as text with one decimal, or with two digits if it is below 1%: 12.3%, 0.042%, 6.1e-11%."""
    return f"{share:.1%}" if not 0 < abs(share) < 0.01 else f"{100 * share:.2g}%"


def warn(message: str) -> None:
    if not _speaker:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def speak_only_of_errors(name: str) -> None:
    """Print nothing but errors from now on, under this name: another process speaks to the user."""
    global _speaker
    _speaker = name
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until this process ends)


def command(*words: str) -> str:
    """Return the words as one line to paste into a shell: sh or similar, on Windows cmd or PowerShell."""
    if os.name != "nt":
        return shlex.join(words)
    return " ".join(word if re.fullmatch(r"[\w.:=,+/\\-]+", word) else f'"{word}"' for word in words)


def argument_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a script, whose help is the script's docstring. `run` reads --traceback."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, **options)
    parser.add_argument("--traceback", action="store_true", help="if an error occurs, show where in the code")
    return parser


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. Exit with one line and code 2 on an error that the user can fix, 130 on Ctrl-C.

    A signal to end is met like Ctrl-C, with the exit code of the signal (SIGTERM: 143).
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that this console cannot show must not end hours of work
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout:  # pythonw on Windows has none
            sys.stdout.flush()  # here and not at exit, so that an error is caught below
    except BrokenPipeError:  # the reader of our output has ended, for example `head`
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            where = error.filename or ("printing" if _output_is_full(error) else "")
            message = (f"{where}: " if where else "") + (error.strerror or message)
        if "--traceback" in sys.argv:
            traceback.print_exception(error)
        print(f"error: {_speaker}{': ' if _speaker else ''}{message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if not _speaker:
            print(f"\ninterrupted{'; ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        sys.exit(_code)


def _interrupt(number: int, _frame: object) -> NoReturn:
    """End as on Ctrl-C; a second signal ends at once."""
    global _code
    _code = 128 + number
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def _output_is_full(error: OSError) -> bool:
    """Return whether stdout cannot be written. If so silence it, since Python would fail once more when it ends."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None and bool(sys.stdout)
    if is_full:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_full
