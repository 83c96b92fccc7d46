"""claim(): one process at a time works on one output file.

The kernel's lock (``flock``) on ``.NAME.lock`` beside the file is the claim. It ends with the process, however
that ends, so a kill leaves no dead claim: at most an empty file that the next claim takes over.

Where a share knows no ``flock``, the claim is the file ``.NAME.owner``, which only one process can create; it
says which process of which machine that was. A dead owner's claim is taken over: at once if the process was of
this machine, and after a day if it was of another, whose processes cannot be seen from here. One kind of claim
does not see the other, so all machines that work in one folder have to mount it alike. A share mounted with
locks that only its own machine sees (such as Lustre's ``localflock``) needs ``kernel_locks=False``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from s4mil_monai.errors import OutputError, PathError
from s4mil_monai.processes import describe_me, has_ended, name_machine

STALE_S = 24 * 3600.0
"""After this long, a claim by name whose owner cannot be seen is nobody's. No slide takes a day."""

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
BUSY = (errno.EWOULDBLOCK, errno.EACCES)

_held: set[Path] = set()
_held_guard = threading.Lock()
_open_locks: set[int] = set()


class BusyError(PathError):
    """Another process, or another thread of this one, works on the same file now; go on with the next."""


def _close_in_child() -> None:
    """A forked child would keep its parent's lock alive after the parent was killed."""
    global _held_guard
    _held_guard = threading.Lock()
    for handle in _open_locks:
        with suppress(OSError):
            os.close(handle)
    _open_locks.clear()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def claim(path: Path, *, kernel_locks: bool = True) -> Iterator[None]:
    """Hold the sole right to write ``path`` while the block runs.

    Look again, inside the block, whether the file is there: whoever held the claim before may have made it.

    Args:
        path: The file to be written. Its folder is made where there is none.
        kernel_locks: False where ``flock`` does not reach the other machines that use the folder.

    Raises:
        BusyError: Someone else holds it.
        OutputError: The folder cannot be written.
    """
    path = path.absolute()
    with ExitStack() as stack:
        stack.enter_context(_only_thread(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _lock(path) if kernel_locks else None
            if handle is None:
                owner = path.with_name(f".{path.name}.owner")
                _own(owner, path)
                stack.callback(_disown, owner, os.getpid())
            else:
                stack.callback(_unlock, path, handle, os.getpid())
        except OSError as error:
            raise OutputError(str(path), f"cannot be claimed ({error.strerror or error})") from error
        yield


@contextmanager
def _only_thread(path: Path) -> Iterator[None]:
    """On NFS, flock holds for a whole process, so its threads are told apart here."""
    with _held_guard:
        if path in _held:
            raise BusyError(str(path), "another thread of this process is writing it")
        _held.add(path)
    try:
        yield
    finally:
        with _held_guard:
            _held.discard(path)


# By the kernel ------------------------------------------------------------------------------------------------


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _lock(path: Path) -> int | None:
    """Lock the file beside ``path`` and give its handle; None where the file system has no locks."""
    lock = _lock_path(path)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_locks.add(handle)
        kept = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before removed the file before letting go. A lock on a file without a name locks
            # nothing: the next process would make, and lock, a new one.
            kept = _is_named(handle, lock)
            if kept:
                return handle
        except OSError as error:
            if error.errno in BUSY:
                raise BusyError(str(path), "another process is writing it") from error
            if error.errno not in NO_FLOCK:
                raise
            with suppress(OSError):
                lock.unlink()
            return None
        finally:
            if not kept:
                _close(handle)


def _is_named(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _unlock(path: Path, handle: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child leaves the block that its parent is still in
    with suppress(OSError):
        _lock_path(path).unlink()
    _close(handle)


def _close(handle: int) -> None:
    _open_locks.discard(handle)
    os.close(handle)


# By name ------------------------------------------------------------------------------------------------------


def _own(owner: Path, path: Path) -> None:
    """Create the file that makes this process the owner, or take a dead owner's place.

    Many may find the same owner dead at once. Its place goes to the one that comes to own the file named after
    that very claim, and that finds the claim unchanged after; the claim itself is replaced, never absent.

    Raises:
        BusyError: Someone else is the owner.
    """
    mine = describe_me()
    try:
        _create(owner, mine)
    except FileExistsError:
        mark = _look(owner, path)
        heir = owner.with_name(f"{owner.name}.{mark}")
        _own(heir, path)
        try:
            if _look(owner, path) != mark:
                raise BusyError(str(path), "another process has just begun to write it") from None
            new = owner.with_name(f"{heir.name}.new")
            new.write_text(mine, encoding="utf-8")
            new.replace(owner)
        finally:
            heir.unlink(missing_ok=True)


def _create(owner: Path, text: str) -> None:
    handle = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def _look(owner: Path, path: Path) -> str:
    """Find a claim dead and give a mark of it, which differs for every claim.

    Raises:
        BusyError: Its owner lives, or may live.
    """
    try:
        text, changed_ns = owner.read_text(encoding="utf-8"), owner.stat().st_mtime_ns
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise BusyError(str(path), "another process has just written it") from error
    facts = _parse(text)
    age_s = time.time() - changed_ns / 1e9
    dead = facts.get("machine") == name_machine() and has_ended(facts)
    if not dead and age_s < STALE_S:
        who = f"process {facts.get('pid', '?')} of {facts.get('machine', 'another machine')}"
        raise BusyError(str(path), f"{who} is writing it; if that is gone, remove {owner}")
    return hashlib.sha256(f"{text} {changed_ns}".encode()).hexdigest()[:12]


def _parse(text: str) -> dict[str, Any]:
    """What an owner wrote; nothing, if it was killed, or is, between creating the file and writing it."""
    with suppress(ValueError):
        facts = json.loads(text)
        if isinstance(facts, dict):
            return facts
    return {}


def _disown(owner: Path, pid: int) -> None:
    # Not in a forked child, and not if the work took so long that another took the place.
    with suppress(OSError):
        if os.getpid() == pid and owner.read_text(encoding="utf-8") == describe_me():
            owner.unlink()
