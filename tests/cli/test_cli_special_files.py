"""What is no file, as an input or output of commands that measure or draw: refused at once, in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import fail, save_model

KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda place: place.mkdir(),
    "device": lambda place: place.symlink_to("/dev/zero"),
    "circle": lambda place: place.symlink_to(place.name),
}
NO_FILE = "folder, pipe or device"
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "compress --calibration": (
        "texts.txt",
        ["compress", "{model}", "-o", "{out}", "--calibration", "{place}"],
    ),
    "compress --html": (
        "page.html",
        ["compress", "{model}", "-o", "{out}", "--calibration", "{model}", "--html", "{place}"],
    ),
    "bench --dlmc": ("patterns/a.smtx", ["bench", "matmul", "--dlmc", "{folder}"]),
    "bench --plot": ("picture.svg", ["bench", "matmul", "--plot", "{place}"]),
    "sensitivity --plot": (
        "picture.svg",
        ["sensitivity", "{model}", "--eval", "math:exp", "--plot", "{place}"],
    ),
    "sensitivity --output": ("a.json", ["sensitivity", "{model}", "--eval", "math:exp", "-o", "{place}"]),
    "search --report": (
        "report.json",
        ["search", "{model}", "--eval", "math:exp", "--min-score", "0", "--report", "{place}"],
    ),
    "demo --html": ("page.html", ["demo", "--html", "{place}"]),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this machine has no pipes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_file(command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("compress"):
        pytest.importorskip("transformers")
    name, arguments = COMMANDS[command]
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    model = save_model(tmp_path)
    KINDS[kind](place)
    known = {"model": model, "out": tmp_path / "out", "place": place, "folder": place.parent}
    message = fail(capsys, *(argument.format(**known) for argument in arguments))
    assert place.name in message
    if command == "compress --calibration":
        assert "expected a file with a text on each line" in message
    elif kind == "circle":
        assert "expected a file or a folder; got links in a circle; remove them" in message
    else:
        assert NO_FILE in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this machine has no pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "circle"])
def test_checkpoints_that_are_no_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, place = save_model(tmp_path), tmp_path / "place.safetensors"
    KINDS[kind](place)
    circle = "expected a file or a folder; got links in a circle; remove them"
    for arguments in (["inspect", place], ["prune", place, "-o", tmp_path / "out"]):
        assert (circle if kind == "circle" else NO_FILE) in fail(capsys, *map(str, arguments))
    message = fail(capsys, "prune", str(model), "-o", str(place))
    written = "expected a file or a directory to write; got a pipe or device; name another"
    assert (circle if kind == "circle" else written) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([model.name, place.name])


@pytest.mark.parametrize("ending", [".h5", ".gguf", ".CKPT"])
def test_kinds_that_are_not_written(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fail(capsys, "prune", str(save_model(tmp_path)), "-o", str(tmp_path / f"out{ending}"))
    assert f"expected a directory, or a file of a kind that is written; got a name in {ending}" in message
    assert not (tmp_path / f"out{ending}").exists()
