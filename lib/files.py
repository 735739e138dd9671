"""Folders that are written, renamed and deleted whole, on file systems that refuse some of it.

A folder's manifest holds the SHA-256 of every other file. It is copied first and deleted last, so
that what a crash leaves half copied or half deleted is detected.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.flags import fail, warn, write_json

MANIFEST = "manifest.json"
writer = ThreadPoolExecutor(1)  # writes one checkpoint at a time; Python waits for it at its end
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF}


@contextlib.contextmanager
def written_whole(folder: Path, *logs: Path) -> Iterator[Path]:
    """Yield a draft to write into, which gets its manifest and the folder's name at the end.

    The folder then appears whole, or not at all; `logs` are on the disk before it.
    """
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
    try:
        draft.mkdir(parents=True)
        yield draft
        follow_umask(draft)
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        write_json(draft / MANIFEST, {str(f.relative_to(draft)): sha256(f) for f in files})
        for path in (*draft.rglob("*"), draft, *logs):
            fsync(path)
        rename(draft, folder)
        fsync(folder.parent)
    except Exception as error:  # mostly a full disk, for which each library raises its own kind
        free = "unknown"
        with contextlib.suppress(OSError):  # the disk itself may be gone
            free = f"{shutil.disk_usage(folder.parent).free / 1e6:.0f}"
        fail(f"cannot write the checkpoint {folder} ({free} MB are free): {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify_manifest(folder: Path) -> str | None:
    """Return what is wrong with a folder by its manifest; None if it is sound or has none."""
    try:
        if not os.path.lexists(folder / MANIFEST):
            return None if any(folder.iterdir()) else "it is empty"
        hashes = json.loads((folder / MANIFEST).read_bytes())
        for name, digest in hashes.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:  # files may be links, though
                return f"{MANIFEST} names {name}, which lies elsewhere"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"cannot read {MANIFEST}: {error}"
    return None


def follow_umask(folder: Path) -> None:
    """Give all files of a model the mode of its config.json: safetensors would hide its own."""
    mode = (folder / "config.json").stat().st_mode
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


def rename(old: Path, new: Path) -> None:
    """Rename a folder, or copy it where its file system cannot rename it."""
    try:
        os.replace(old, new)
    except OSError:
        new.mkdir()
        shutil.copy2(old / MANIFEST, new)
        shutil.copytree(old, new, dirs_exist_ok=True)
        for path in (*new.rglob("*"), new):
            fsync(path)


def remove(folder: Path) -> None:
    """Delete a folder, under another name: a crash never leaves a part of it under its own.

    overlayfs renames no folder of its lower layer. One that cannot be deleted stays.
    """
    old = folder.with_name(f".{folder.name}.old.part")
    try:
        os.replace(folder, old)
    except OSError:
        old = folder
    delete(old)
    if old.exists():
        warn(f"{old} cannot be deleted")


def delete(path: Path) -> None:
    """Delete a folder, a file or a link to one, as far as the file system lets us."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    for file in path.rglob("*"):
        if file.name != MANIFEST and not file.is_dir():
            with contextlib.suppress(OSError):
                file.unlink()
    shutil.rmtree(path, ignore_errors=True)
