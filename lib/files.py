"""Folders that are written, renamed and deleted whole.

A folder's manifest holds the SHA-256 of every other file, so that later damage is detected.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.flags import fail, write_json

MANIFEST = "manifest.json"
writer = ThreadPoolExecutor(1)  # writes one checkpoint at a time; Python waits for it at its end


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
        for path in (*draft.rglob("*"), draft, *filter(Path.exists, logs)):
            fsync(path)
        os.replace(draft, folder)
        fsync(folder.parent)
    except Exception as error:  # mostly a full disk, for which each library raises its own kind
        fail(f"cannot write the checkpoint {folder} (is the disk full?): {error}")
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
        for name, digest in json.loads((folder / MANIFEST).read_bytes()).items():
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
    """Wait until a file is on the disk, or a folder, where the file system can do that."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(file)


def remove(folder: Path) -> None:
    """Delete a folder, under another name: a crash never leaves a part of it under its own."""
    old = folder.with_name(f".{folder.name}.old.part")
    os.replace(folder, old)
    delete(old)


def delete(folder: Path) -> None:
    """Delete a folder, or a link to one, as far as the file system lets us."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
