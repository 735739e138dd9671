"""Folders that are written, renamed and deleted whole, on file systems that refuse some of it.

A folder's manifest says what has to be in it. It is copied first and deleted last, so that what a
crash leaves half copied or half deleted is detected.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from lib.flags import warn

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF}


def follow_umask(folder: Path, like: str) -> None:
    """Give all files the mode of the one called `like`: safetensors would hide its own."""
    mode = (folder / like).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError):  # a file system without modes
                file.chmod(mode)


def fsync(path: Path) -> None:
    """fsync a file or directory, if it exists and its file system can."""
    if not path.exists():
        return
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def rename(old: Path, new: Path, manifest: str) -> None:
    """Rename a folder, or copy it where its file system cannot rename it."""
    try:
        os.replace(old, new)
    except OSError:
        new.mkdir()
        shutil.copy2(old / manifest, new)
        shutil.copytree(old, new, dirs_exist_ok=True)
        for path in (*new.rglob("*"), new):
            fsync(path)


def remove(folder: Path, manifest: str) -> None:
    """Delete a folder, under another name: a crash never leaves a part of it under its own.

    overlayfs renames no folder of its lower layer. One that cannot be deleted stays.
    """
    old = folder.with_name(f".{folder.name}.old.part")
    try:
        os.replace(folder, old)
    except OSError:
        old = folder
    delete(old, manifest)
    if old.exists():
        warn(f"{old} cannot be deleted")


def delete(path: Path, manifest: str) -> None:
    """Delete a folder, a file or a link to one, as far as the file system lets us."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    for file in path.rglob("*"):
        if file.name != manifest and not file.is_dir():
            with contextlib.suppress(OSError):
                file.unlink()
    shutil.rmtree(path, ignore_errors=True)
