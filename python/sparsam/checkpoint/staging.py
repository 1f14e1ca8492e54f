"""A folder in which a long run writes its files, and from which all of them are moved to their places.

A run that is killed leaves the folder; the same run continues in it, another one clears it. No file appears
under its final name before all are complete.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from sparsam.checkpoint.atomic import LOCK, check_target, publish, short
from sparsam.checkpoint.json_state import Document, read
from sparsam.checkpoint.locks import locked, real_path
from sparsam.inputs.system import sync

__all__ = ["Staging", "open_staging"]

_STATE = "state.json"


class _State(Document, frozen=True):
    """The run that a folder belongs to, whether its files are being moved, and the notes of the run."""

    WHAT: ClassVar[str] = "the state of a run over files"
    MARK: ClassVar[str] = "sparsam_files"

    run: str
    moving: bool = False
    notes: str = ""


class Staging:
    """The folder of one run: it writes its results in `files`, and intermediate data in `work`."""

    def __init__(self, folder: Path, target: Path, *, is_folder: bool, run: str) -> None:
        """Takes the folder; `open_staging` makes it."""
        self._folder = folder
        self._target = target
        self._is_folder = is_folder
        self._run = run
        self.files, self.work = folder / "files", folder / "work"
        self.finished = ""

    @property
    def notes(self) -> str:
        """The notes that the run saved; "" if there are none."""
        state = self._read()
        return state.notes if state and state.run == self._run else ""

    def note(self, text: str) -> None:
        """Saves notes for the case that the run is killed and continued."""
        self._write(notes=text, moving=False)

    def start(self) -> None:
        """Ends a move that was interrupted; keeps the files of the same run, and removes those of others."""
        state = self._read()
        if state is not None and state.moving:
            self._move()
            if state.run == self._run:
                self.finished = state.notes
                return
        if state is None or state.moving or state.run != self._run:
            for path in self._folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self._write(notes="", moving=False)
        self.files.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)

    def finish(self, notes: str) -> None:
        """Moves all files to their places."""
        self._write(notes=notes, moving=True)
        self._move()

    def _move(self) -> None:
        """Removes an old index first and moves the new one last, so that no mixture is a checkpoint."""
        if not self.files.is_dir():
            return
        if self._is_folder and not self._target.exists():
            for folder in {path.parent for path in self.files.rglob("*")}:
                sync(folder)
            self.files.rename(self._target)
            sync(self._target.parent)
            return
        moves = {
            path: self._target / path.relative_to(self.files) if self._is_folder else self._target
            for path in sorted(self.files.rglob("*"), key=lambda path: (path.suffix == ".json", str(path)))
            if path.is_file()
        }
        places = [check_place(place) for place in moves.values()]
        for path, place in zip(moves, places, strict=True):
            if path.name.endswith(".index.json"):
                place.unlink(missing_ok=True)
        for path, place in zip(moves, places, strict=True):
            if place.exists():
                path.chmod(place.stat().st_mode)
            try:
                path.replace(place)
            except OSError as error:
                if error.errno != errno.EXDEV:  # a link to another file system
                    raise
                publish({place: lambda target, path=path: shutil.copyfile(path, target)})  # type: ignore[misc]
        for folder in {place.parent for place in places}:
            sync(folder)

    def _read(self) -> _State | None:
        file = self._folder / _STATE
        if not file.exists():
            return None
        return _State.from_json(read(file, "delete it"), str(file), f"delete {self._folder}")

    def _write(self, *, notes: str, moving: bool) -> None:
        text = _State(run=self._run, moving=moving, notes=notes).to_json()
        publish({self._folder / _STATE: lambda path: path.write_text(text, encoding="utf-8")})


def check_place(place: Path) -> Path:
    """Makes the folder of a file, and checks that the file can be written; follows links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return check_target(place)


@contextmanager
def open_staging(target: Path, *, is_folder: bool, run: str) -> Iterator[Staging]:
    """Makes and locks the folder for a target; it is removed at the end, unless the run was interrupted.

    Args:
        target: The file or folder that the run makes. A folder may exist; what lies in it is kept.
        is_folder: Which of the two.
        run: The identity of the run.

    Raises:
        ValueError: Another run is at work on this target.
        OSError: The folder cannot be made.
    """
    target = real_path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(target.parent))
    name = f".sparsam-{short(target.name)}.partial"
    folder = target.with_name(name)
    if target.is_dir() and not folder.is_dir():
        folder = target / name  # the target may be a mount point, and its parent closed
    folder.mkdir(exist_ok=True)
    with locked(folder / LOCK) as free:
        if not free:
            wanted = "a target of one run"
            msg = f"{target}: expected {wanted}; got one that another run writes; wait until it ends"
            raise ValueError(msg)
        staging = Staging(folder, target, is_folder=is_folder, run=run)
        try:
            staging.start()
            yield staging
        except (ValueError, TypeError):  # which the same run would meet again
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
