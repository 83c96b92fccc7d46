"""Claims: one process a file, and none after a kill. Real processes, real signals."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from s4mil_monai.errors import OutputError
from s4mil_monai.features import claim as claim_module
from s4mil_monai.features.claim import BusyError, claim
from s4mil_monai.features.store import clear_leftovers, load_bag, save_bag
from s4mil_monai.processes import name_machine
from tests.features.test_store import end_a_process, make_real_bag

KINDS = pytest.mark.parametrize("kernel_locks", [True, False], ids=["kernel", "name"])

# Opens each file for writing under its claim with O_EXCL, so that a second writer at the same time would fail.
RACE = """
import os, sys, time
from pathlib import Path
from s4mil_monai.features.claim import BusyError, claim
folder, kernel_locks = Path(sys.argv[1]), sys.argv[2] == "True"
(folder / f"ready.{os.getpid()}").touch()
while len(list(folder.glob("ready.*"))) < 3:
    time.sleep(0.001)
done = 0
while done < 20:
    done = 0
    for number in range(20):
        path = folder / f"{number}.out"
        if path.exists():
            done += 1
            continue
        try:
            with claim(path, kernel_locks=kernel_locks):
                if path.exists():
                    continue
                writing = folder / f"{number}.writing"
                os.close(os.open(writing, os.O_CREAT | os.O_EXCL))
                time.sleep(0.002)
                writing.unlink()
                path.write_text(str(os.getpid()))
                print(number)
        except BusyError:
            pass
"""

HOLD = """
import sys, time
from pathlib import Path
from s4mil_monai.features.claim import claim
with claim(Path(sys.argv[1]), kernel_locks=sys.argv[2] == "True"):
    print("held", flush=True)
    time.sleep(600)
"""

WRITE = """
import os, sys, time
from pathlib import Path
from s4mil_monai.features import store
from s4mil_monai.features.claim import claim
from tests.features.test_store import make_real_bag
def stop(handle):
    print("half", flush=True)
    time.sleep(600)
os.fsync = stop
with claim(Path(sys.argv[1])):
    store.save_bag(Path(sys.argv[1]), make_real_bag())
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@KINDS
def test_three_processes_over_twenty_files_never_write_the_same_one(tmp_path, kernel_locks):
    processes = [start(RACE, tmp_path, kernel_locks) for _ in range(3)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    written = [int(line) for out, _ in outputs for line in out.split()]
    assert sorted(written) == list(range(20))
    assert sorted(path.suffix for path in tmp_path.iterdir() if not path.name.startswith("ready")) == [".out"] * 20


@KINDS
def test_file_claimed_by_another_process_is_refused_and_free_after_its_kill(tmp_path, kernel_locks):
    path = tmp_path / "a.h5"
    holder = start(HOLD, path, kernel_locks)
    wait_for(holder, "held")
    with pytest.raises(BusyError, match="writing it"), claim(path, kernel_locks=kernel_locks):
        pass
    kill(holder)
    with claim(path, kernel_locks=kernel_locks):
        assert len(list(tmp_path.iterdir())) == 1  # the claim itself
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_no_file_and_a_resumed_run_completes(tmp_path):
    path = tmp_path / "a.h5"
    writer = start(WRITE, path)
    wait_for(writer, "half")
    assert clear_leftovers(tmp_path) == []  # it is being written
    kill(writer)
    assert not path.exists()
    assert len(clear_leftovers(tmp_path)) == 1
    with claim(path):
        save_bag(path, make_real_bag())
    assert len(load_bag(path)) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


@KINDS
def test_two_threads_of_one_process_do_not_share_a_claim(tmp_path, kernel_locks):
    refused = []

    def try_it():
        try:
            with claim(tmp_path / "a.h5", kernel_locks=kernel_locks):
                pass
        except BusyError as error:
            refused.append(error)

    with claim(tmp_path / "a.h5", kernel_locks=kernel_locks):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert len(refused) == 1


@KINDS
def test_claim_is_given_back_when_the_work_fails(tmp_path, kernel_locks):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "a.h5", kernel_locks=kernel_locks):
        _ = 1 / 0
    with claim(tmp_path / "a.h5", kernel_locks=kernel_locks):
        pass
    assert list(tmp_path.iterdir()) == []


@KINDS
def test_forked_child_that_ends_does_not_give_its_parents_claim_back(tmp_path, kernel_locks):
    child = f"""
import os
from pathlib import Path
from s4mil_monai.features.claim import claim
path = Path({str(tmp_path / "a.h5")!r})
with claim(path, kernel_locks={kernel_locks}):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print(len(list(path.parent.iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_forked_child_does_not_keep_a_killed_parents_claim_alive(tmp_path):
    path = tmp_path / "a.h5"
    parent = start(
        f"""
import os, time
from pathlib import Path
from s4mil_monai.features.claim import claim
with claim(Path({str(path)!r})):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with claim(path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_file_system_without_locks_is_claimed_by_name(tmp_path, monkeypatch):
    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("s4mil_monai.features.claim.fcntl.flock", no_locks)
    with claim(tmp_path / "a.h5"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.h5.owner"]
    assert list(tmp_path.iterdir()) == []


def test_lock_on_a_file_that_was_removed_meanwhile_is_no_claim(tmp_path, monkeypatch):
    lock, flock, calls = tmp_path / ".a.h5.lock", fcntl.flock, []

    def let_go_before(handle, operation):  # as the holder before does, after this process opened the file
        calls.append(handle)
        if len(calls) == 1:
            lock.unlink()
        flock(handle, operation)

    monkeypatch.setattr("s4mil_monai.features.claim.fcntl.flock", let_go_before)
    with claim(tmp_path / "a.h5"):
        assert lock.is_file()
    assert len(calls) == 2


def test_threads_are_told_apart_where_a_lock_is_a_whole_processs(tmp_path, monkeypatch):
    monkeypatch.setattr("s4mil_monai.features.claim.fcntl.flock", lambda handle, operation: None)  # as on NFS
    with (
        claim(tmp_path / "a.h5"),
        pytest.raises(BusyError, match="another thread"),
        claim(tmp_path / "a.h5"),
    ):
        pass


def write_owner(folder: Path, *, age_s: float = 0.0, **facts: object) -> Path:
    owner = folder / ".a.h5.owner"
    owner.write_text(json.dumps(facts) if facts else "")
    then = time.time() - age_s
    os.utime(owner, (then, then))
    return owner


def test_owner_on_another_machine_counts_as_living_for_a_day(tmp_path):
    owner = write_owner(tmp_path, machine="elsewhere-1", pid=1, started="1")
    with (
        pytest.raises(BusyError, match=r"process 1 of elsewhere-1 is writing it; if that is gone, remove"),
        claim(tmp_path / "a.h5", kernel_locks=False),
    ):
        pass
    assert owner.is_file()
    write_owner(tmp_path, machine="elsewhere-1", pid=1, started="1", age_s=25 * 3600)
    with claim(tmp_path / "a.h5", kernel_locks=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_owner_whose_number_another_process_has_now_is_gone(tmp_path):
    write_owner(tmp_path, machine=name_machine(), pid=os.getpid(), started="1")
    with claim(tmp_path / "a.h5", kernel_locks=False):
        pass


@pytest.mark.parametrize("facts", [{}, {"machine": name_machine(), "pid": "x"}])
def test_owner_that_says_nothing_useful_counts_as_living(tmp_path, facts):
    write_owner(tmp_path, **facts)
    with pytest.raises(BusyError), claim(tmp_path / "a.h5", kernel_locks=False):
        pass


def test_dead_owners_place_goes_to_one_of_many(tmp_path):
    script = """
import sys, time
from pathlib import Path
from s4mil_monai.features.claim import BusyError, claim
folder = Path(sys.argv[1])
for number in range(30):
    (folder / f"{number}.{sys.argv[2]}").touch()
    while len(list(folder.glob(f"{number}.*"))) < 2:
        time.sleep(0.0005)
    try:
        with claim(folder / f"{number}" / "a.h5", kernel_locks=False):
            print(number, flush=True)
            (folder / f"{number}.won{sys.argv[2]}").touch()
            while not (folder / f"{number}.lost{3 - int(sys.argv[2])}").exists():
                time.sleep(0.0005)
    except BusyError:
        (folder / f"{number}.lost{sys.argv[2]}").touch()
"""
    gone = end_a_process()
    for number in range(30):
        (tmp_path / str(number)).mkdir()
        write_owner(tmp_path / str(number), machine=name_machine(), pid=gone, started="1")
    processes = [start(script, tmp_path, number) for number in (1, 2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert sorted(int(line) for out, _ in outputs for line in out.split()) == list(range(30)), outputs
    assert [list((tmp_path / str(number)).iterdir()) for number in range(30)] == [[]] * 30


def test_dead_owner_replaced_while_another_was_about_to_is_left_alone(tmp_path, monkeypatch):
    create, living = claim_module._create, {"machine": "elsewhere-1", "pid": 1, "started": "1"}
    owner = write_owner(tmp_path, machine=name_machine(), pid=end_a_process(), started="1")

    def come_second(path, text):
        if path != owner:
            write_owner(tmp_path, **living)
        create(path, text)

    monkeypatch.setattr(claim_module, "_create", come_second)
    with pytest.raises(BusyError, match="elsewhere-1"), claim(tmp_path / "a.h5", kernel_locks=False):
        pass
    assert json.loads(owner.read_text()) == living
    assert list(tmp_path.iterdir()) == [owner]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"a\.h5: cannot be claimed"), claim(tmp_path / "file" / "a.h5"):
        pass
