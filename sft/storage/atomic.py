"""Folders that are complete or absent, also after a power cut: written beside their place, flushed to the disk, renamed.

A manifest with the size and the hash of every file lies in such a folder, so that damage which came later is found.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft.sanitize import shown

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

ASIDE = "aside"


@contextlib.contextmanager
def new_folder(place: Path, manifest: bool = True, replace: bool = True) -> Iterator[Path]:
    """Write into the folder this gives; it takes the name `place` when the block ends well, and vanishes if it does not.

    What stood at `place` before is there until then; with `replace=False` it stays, because another process made the same.
    Raises OSError where the disk does.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp's folders are for their owner alone
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if manifest:
            write_manifest(work)
        sync_folder(work)
        if replace:
            _swap(work, place)
        else:
            _take_place(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever met under its name."""
    if folder.exists():
        gone = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with contextlib.suppress(OSError):
            folder.rename(gone / folder.name)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(parent: Path, *names: str) -> None:
    """Remove what `new_folder`, `remove_folder` and write_json had in hand in `parent` when their process was killed.

    A folder that had just moved aside for its successor moves back.
    """
    for name in names:
        for old in parent.glob(f".{name}-{ASIDE}-*/*"):
            if not (parent / old.name).exists():
                old.rename(parent / old.name)
        for left in parent.glob(f".{name}-*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def drop_link(path: Path) -> None:
    """Take away a link where a file of a run is about to be changed: what it points to belongs to no run."""
    if path.is_symlink():
        log.warning("%s is a link, which is not followed: it is removed.", shown(str(path)))
        path.unlink()


def sync_file(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. A missing one is nothing to wait for."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The same for a folder with everything in it."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def write_manifest(folder: Path) -> None:
    """Write the size and hash of every file of a folder into its manifest.json."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        hashes = list(pool.map(_hash, files.values()))
    facts = {name: {"bytes": files[name].stat().st_size, "sha256": one} for name, one in zip(files, hashes, strict=True)}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest, or None. `hashes=False` compares sizes only."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, fact in facts.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes in place of {fact['bytes']:,}"
            if hashes and _hash(path) != fact["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return None


def _swap(work: Path, place: Path) -> None:
    """Rename `work` to `place`; a folder that stands there moves aside first and is removed after."""
    aside = None
    if place.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}-{ASIDE}-", dir=place.parent))
        place.rename(aside / place.name)
    try:
        work.rename(place)
    except OSError:
        if aside:
            (aside / place.name).rename(place)
        raise
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    sync_file(place.parent)


def _take_place(work: Path, place: Path) -> None:
    """Rename `work` to `place` unless another process was faster."""
    try:
        work.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    sync_file(place.parent)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the whole new one, also after a power cut.

    Half a character, as JSON can hold one, becomes `?`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_file(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
