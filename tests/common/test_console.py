"""common/console.py: errors of one line, exit codes, progress, tables, commands to paste."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from common import console
from common.console import Progress, UserError, argument_parser, command, markdown_table, percent, run, table


@pytest.mark.parametrize(("error", "code", "text"), [
    (UserError("x.png: broken"), 2, "error: x.png: broken"), (KeyboardInterrupt(), 130, "interrupted"),
    (PermissionError(13, "Permission denied", "/y"), 2, "error: /y: Permission denied")])
def test_what_a_user_can_fix_ends_in_one_line(error, code, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code and capsys.readouterr().err.strip() == text


def test_an_error_in_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_tables_are_aligned():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    assert table(["a", "long"], [["name", "1"], ["b", "22"]]) == "a     long\nname     1\nb       22"


@pytest.mark.parametrize(("share", "text"), [(0.123, "12.3%"), (0.01, "1.0%"), (0.00042, "0.042%"), (0, "0.0%"),
                                             (6.1e-13, "6.1e-11%"), (-0.5, "-50.0%")])
def test_small_shares_keep_two_digits(share, text):
    assert percent(share) == text


def test_plain_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 31.0, 31.0, 32.0, 62.0, 62.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock, 62.0))
    with Progress("filter", 4, "tile") as progress:
        for _ in range(4):
            progress.advance(note="loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines and lines[0].startswith("filter: 2/4 tile") and lines[0].endswith("loss 1") and len(lines) <= 2


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    with Progress("train", 2, "batch") as progress:
        progress.bar.mininterval = 0
        progress.advance(note="loss 0.25")
        progress.advance(note="loss 0.20")
    assert "train" in terminal.getvalue() and "loss 0.2" in terminal.getvalue() and "\r" in terminal.getvalue()


@pytest.mark.parametrize("error", [UserError("x.png: broken"), OSError(5, "Input/output error", "/y")])
def test_a_traceback_is_shown_on_request(error, monkeypatch, capsys):
    def main():
        argument_parser("docs").parse_args()
        raise error

    for argument, shown in (([], False), (["--traceback"], True)):
        monkeypatch.setattr(sys, "argv", ["script.py", *argument])
        with pytest.raises(SystemExit) as end:
            run(main)
        said = capsys.readouterr().err
        assert end.value.code == 2 and ("in main" in said) == shown and said.splitlines()[-1].startswith("error: ")


def test_a_name_that_the_console_cannot_show_does_not_end_the_work(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run(lambda: print("wrote runs/prüfung"))
    stream.flush()
    assert stream.buffer.getvalue().strip() == b"wrote runs/pr\\xfcfung"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, REPOSITORY / "receptive_field.py", "--theory"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a POSIX shell")
def test_without_an_output_the_work_is_done(tmp_path):
    done = subprocess.run(f"{sys.executable} {REPOSITORY / 'receptive_field.py'} --theory >&-", shell=True,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_options_are_not_abbreviated(monkeypatch, capsys):
    """Otherwise argparse reads --trace as --traceback, but `run` does not."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--trace"])
    with pytest.raises(SystemExit):
        argument_parser("docs").parse_args()
    assert "unrecognized arguments: --trace" in capsys.readouterr().err


def test_commands_can_be_pasted_into_the_shell_of_the_system(monkeypatch):
    words = ["python", "train.py", "--config", "my configs/x.yaml", r"data.group=^(s\d+)", "runs/a-1", r"C:\x"]
    assert command("a b", "c") == "'a b' c"
    monkeypatch.setattr(console.os, "name", "nt")
    assert command(*words) == r'python train.py --config "my configs/x.yaml" "data.group=^(s\d+)" runs/a-1 C:\x'


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without a signal")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_end_is_met_like_ctrl_c(name, code):
    """Files that are being written are removed on the way out."""
    program = ("import time\nfrom common import console\ndef main():\n    try:\n        print('ready', flush=True)\n"
               "        time.sleep(100)\n    finally:\n        print('cleaned', flush=True)\nconsole.run(main)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    out, errors = process.communicate()
    assert (process.returncode, out) == (code, "cleaned\n") and errors.strip() == "interrupted"
