"""Files that outlive writes that fail: lines that are added, small files as a whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

_KEPT: Final = 4 * 2**20
"""Bytes that wait for a write to succeed; the oldest lines go where there are more."""


class Lines:
    """Appends lines, and tries again later what could not be written.

    No line is left half written: it is taken back, or what follows begins a new one.
    Nothing here raises an OSError.

    Args:
        path: The file; it is made by the first write.
        say: Told once that writing fails, and once that it works again.
        kept: Bytes that may wait.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], *, kept: int = _KEPT
    ) -> None:
        self.lost = 0
        """Lines that were given up."""
        self._path, self._say, self._kept = path, say, kept
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._file: int | None = None
        self._cut = False
        self._failing = False
        self._told = 0

    @property
    def waiting(self) -> int:
        """How many lines wait to be written."""
        return len(self._waiting)

    def write(self, lines: Iterable[str] = ()) -> int:
        """Write lines, and those that wait.

        Args:
            lines: Each of ASCII, without its end.

        Returns:
            The bytes that were written.
        """
        new = [f"{line}\n".encode("ascii") for line in lines]
        self._waiting.extend(new)
        self._bytes += sum(map(len, new))
        if not self._waiting and self._file is not None:
            return 0
        before = self._bytes
        try:
            self._write()
        except OSError as error:
            self._failed(error)
        else:
            self._succeeded()
        written = before - self._bytes
        while self._bytes > self._kept:
            self._bytes -= len(self._waiting.popleft())
            self.lost += 1
        return written

    def _write(self) -> None:
        """Write what waits; forget what has arrived, even if the rest has not."""
        if self._file is None:
            # Unbuffered: nothing of a line is left for a forked child to write again.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file = os.open(self._path, flags, 0o666)
        if os.fstat(self._file).st_nlink == 0 and not self._path.exists():
            raise FileNotFoundError(f"{self._path.name} was deleted")
        if self._cut:
            self._cut = os.write(self._file, b"\n") != 1
        arrived = 0
        try:
            data = b"".join(self._waiting)
            while arrived < len(data):
                more = os.write(self._file, data[arrived:])
                if not more:
                    raise OSError("nothing was written")
                arrived += more
        finally:
            self._forget(arrived)

    def _forget(self, arrived: int) -> None:
        """Forget the lines that have arrived, and take back the part of one."""
        if arrived == self._bytes:
            self._waiting.clear()
            self._bytes = 0
            return
        while self._waiting and arrived >= len(self._waiting[0]):
            whole = len(self._waiting.popleft())
            arrived, self._bytes = arrived - whole, self._bytes - whole
        if arrived and self._file is not None:
            self._take_back(self._file, arrived)

    def _take_back(self, file: int, part: int) -> None:
        """Cut off the part of a line that has arrived, or end that line."""
        self._cut = True
        if os.fstat(file).st_size >= part:
            os.ftruncate(file, os.fstat(file).st_size - part)
            self._cut = False

    def _failed(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            self._say(
                f"{self._path} cannot be written ({error.strerror or error}); training "
                "goes on, what is new waits in memory, and writing is tried again; it "
                "is lost if that fails to the end."
            )

    def _succeeded(self) -> None:
        if self._failing:
            self._failing = False
            missing, self._told = self.lost - self._told, self.lost
            gap = f"; {missing} lines before that are lost" if missing else ""
            self._say(f"{self._path} is written again{gap}.")

    def close(self) -> None:
        """Close the file; what still waits is lost. Safe to call twice."""
        self.lost += len(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.close(file)
            except OSError as error:
                self._failed(error)


class SmallFiles:
    """Writes small files so that a reader never sees half of one, and tries again.

    Args:
        folder: Where they go.
        say: Told once that writing fails, and once that it works again.
        kept: How many may wait; the oldest goes where there are more.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None], *, kept: int = 64
    ) -> None:
        self.lost = 0
        """Files that were given up."""
        self._folder, self._say, self._kept = folder, say, kept
        self._waiting: dict[Path, str] = {}
        self._failing = False

    @property
    def waiting(self) -> int:
        """How many files wait to be written."""
        return len(self._waiting)

    def write(self, path: Path | None = None, line: str = "") -> None:
        """Write a file of one line, and those that wait.

        Args:
            path: Its place in the folder; None: only those that wait.
            line: Of ASCII, without its end.
        """
        if path is not None:
            self._waiting.pop(path, None)
            self._waiting[path] = line
        for waiting, content in list(self._waiting.items()):
            try:
                self._replace(self._folder / waiting, content)
            except OSError as error:
                self._failed(waiting, error)
            else:
                del self._waiting[waiting]
        if self._failing and not self._waiting:
            self._failing = False
            gap = f"; {self.lost} are lost" if self.lost else ""
            self._say(f"small files in {self._folder} are written again{gap}.")
        while len(self._waiting) > self._kept:
            del self._waiting[next(iter(self._waiting))]
            self.lost += 1

    @staticmethod
    def _replace(path: Path, line: str) -> None:
        if not path.parent.is_dir() and path.parent.parent.is_dir():
            path.parent.mkdir()
        draft = path.with_suffix(".tmp")
        draft.write_text(f"{line}\n", encoding="ascii", newline="\n")
        os.replace(draft, path)

    def _failed(self, path: Path, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            self._say(
                f"{self._folder / path} cannot be written ({error.strerror or error}); "
                "training goes on, and writing is tried again."
            )
