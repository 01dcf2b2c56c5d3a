"""Deleting a tree that somebody hostile has grown: any depth, any number and kind of names.

Neither recursion nor a path as long as the tree is deep: what is in a folder below the top is
deleted or, if it is a folder, moved up to the top, and so on until nothing is left. At any time
a handful of descriptors is open, and no list of names is kept. Names are only ever used relative
to a folder that was opened without following a link, so nothing outside of the tree is touched.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

from worker.files.opening import FOLDER, LOOK, closing, magic

logger = logging.getLogger(__name__)

MOST_COMPLAINTS = 5
"""Names of what cannot be deleted, in the log."""


def remove_tree(path: Path) -> bool:
    """Delete a folder, or whatever has its name; whether it is gone, which it is if it never was.

    What cannot be deleted is named in the log. Nobody may be adding to it meanwhile. Takes
    as long as there are names: some 10 µs each.
    """
    try:
        # The folder above is ours, and may be a link that its administrator made.
        with closing(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
            try:
                top = _enter(path.name, parent)
            except NotADirectoryError:
                os.unlink(path.name, dir_fd=parent)
                return True
            with closing(top):
                _Emptying(path, top).run()
            os.rmdir(path.name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        logger.warning("cannot remove %s: %s; remove it by hand", path, error.strerror)
        return False
    return True


def empty(path: Path, top: int) -> None:
    """Delete what is in a folder that is open as ``top``; ``path`` is its name for the log."""
    _Emptying(path, top).run()


class _Emptying:
    def __init__(self, path: Path, top: int) -> None:
        self._path = path
        self._top = top
        self._moved = 0
        self._handled = 0
        self._removed = 0
        self._failures: list[str] = []
        self._failed = 0
        # What is moved up gets a name that nobody can have foreseen, and is found by its number.
        self._prefix = f"{secrets.token_hex(12)}."

    def run(self) -> None:
        """Go over the top again and again for as long as that removes something."""
        while True:
            before = self._removed
            self._failures, self._failed = [], 0
            try:
                self._delete_all(self._top, is_top=True)
                while self._handled < self._moved:
                    name = f"{self._prefix}{self._handled}"
                    self._handled += 1
                    self._delete_folder(name, self._top)
            except OSError as error:
                self._fail("", error)
            if self._removed == before:
                break
        for failure in self._failures:
            logger.warning("cannot remove %s; remove it by hand", failure)
        if self._failed > len(self._failures):
            logger.warning("cannot remove %d names in %s altogether", self._failed, self._path)

    def _delete_all(self, folder: int, *, is_top: bool = False) -> None:
        """Delete the files of a folder. Its folders are moved to the top; the top's are deleted."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(name, dir_fd=folder)
                        self._removed += 1
                    elif not is_top:
                        self._move_up(name, folder)
                    elif self._is_due(name):
                        self._delete_folder(name, folder)
                except OSError as error:
                    self._fail(name, error)

    def _is_due(self, name: str) -> bool:
        """Not one that was moved up and has its turn later."""
        number = name.removeprefix(self._prefix)
        return number == name or int(number) < self._handled

    def _delete_folder(self, name: str, parent: int) -> None:
        try:
            with closing(_enter(name, parent)) as folder:
                self._delete_all(folder)
            os.rmdir(name, dir_fd=parent)
            self._removed += 1
        except OSError as error:
            self._fail(name, error)

    def _move_up(self, name: str, folder: int) -> None:
        target = f"{self._prefix}{self._moved}"
        try:
            os.rename(name, target, src_dir_fd=folder, dst_dir_fd=self._top)
        except PermissionError:
            # Its entry ".." changes, too, so it must be writable for us.
            os.close(_enter(name, folder))
            os.rename(name, target, src_dir_fd=folder, dst_dir_fd=self._top)
        self._moved += 1

    def _fail(self, name: str, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        self._failed += 1
        if len(self._failures) < MOST_COMPLAINTS:
            # Quoted: the name was chosen by the job.
            self._failures.append(f"{str(self._path / name)!r}: {error.strerror}")


def _enter(name: str, parent: int) -> int:
    """Open a folder to delete what is in it, also if its mode forbids that to its owner, us."""
    with closing(os.open(name, LOOK | os.O_DIRECTORY, dir_fd=parent)) as handle:
        found = os.fstat(handle)
        if stat.S_IMODE(found.st_mode) & 0o700 != 0o700 and found.st_uid == os.geteuid():
            Path(magic(handle)).chmod(0o700)
        return os.open(".", FOLDER, dir_fd=handle)
