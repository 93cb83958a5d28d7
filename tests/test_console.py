"""console.py and hardware.py."""

import io

import pytest
import torch

import console
from console import Progress, UserError, run, table
from hardware import autocast, choose_device, choose_precision, has_bf16, peak_memory_mb


@pytest.mark.parametrize(("error", "code", "text"), [
    (UserError("x.png: broken"), 2, "error: x.png: broken"), (KeyboardInterrupt(), 130, "interrupted"),
    (PermissionError(13, "Permission denied", "/y"), 2, "error: /y: Permission denied")])
def test_what_a_user_can_mend_ends_in_one_line(error, code, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code and capsys.readouterr().err.strip() == text


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_tables_are_aligned():
    assert table(["a", "long"], [["name", "1"], ["b", "22"]]) == "a     long\nname     1\nb       22"


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


def test_devices_and_precisions():
    cpu = choose_device("cpu")
    assert choose_precision("float32", cpu) == torch.float32 and choose_precision("bf16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) == (torch.bfloat16 if has_bf16(cpu) else torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    assert choose_precision("float32", cpu) == torch.float32 and not torch.backends.cudnn.allow_tf32
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    layer = torch.nn.Linear(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(cpu, dtype):
            assert layer(torch.zeros(1, 2)).dtype == dtype
    assert 1 < peak_memory_mb(cpu) < 1e6
