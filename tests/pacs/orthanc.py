"""A real PACS: Orthanc with authentication and strict peers, in a network of its own."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
HTTP_PORT, DICOM_PORT, USER, PASSWORD = 8042, 4242, "scorer", "geheim"
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why Orthanc cannot be tested with here."""
    if shutil.which("Orthanc") is None or not PLUGIN.exists():
        return "Orthanc is not installed: apt-get install --no-install-recommends orthanc orthanc-dicomweb"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "a network namespace, which keeps Orthanc on loopback, needs root and iproute2"
    return None


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network that has loopback and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no network namespace can be made here ({os.strerror(ctypes.get_errno())})")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0
    finally:
        os.close(before)


class Orthanc:
    """A running server."""

    def __init__(self, folder: Path):
        self.web, self.rest = f"http://127.0.0.1:{HTTP_PORT}/dicom-web", f"http://127.0.0.1:{HTTP_PORT}"
        self.session = requests.Session()
        self.session.auth = (USER, PASSWORD)
        settings = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "index"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": HTTP_PORT,
            "DicomPort": DICOM_PORT,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowStore": False,
            "DicomModalities": {"s4mil": ["S4MIL", "127.0.0.1", 11112]},
            "KeepAliveTimeout": 60,  # of seconds; the default of 1 closes connections just as they are used again
            "HttpCompressionEnabled": False,
            "UnknownSopClassAccepted": True,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self._log = (folder / "orthanc.log").open("wb")
        self._process = subprocess.Popen(
            ["Orthanc", str(folder / "orthanc.json")], stdout=self._log, stderr=self._log
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(1200):
            try:
                self.session.get(f"{self.rest}/system", timeout=1).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.1)
        raise RuntimeError("Orthanc does not answer")

    def empty(self) -> None:
        """Delete every patient."""
        for patient in self.get("patients"):
            self.session.delete(f"{self.rest}/patients/{patient}", timeout=30).raise_for_status()

    def get(self, path: str):
        """JSON of the REST interface."""
        return self.session.get(f"{self.rest}/{path}", timeout=30).json()

    def find(self, level: str, **query: str) -> list[str]:
        """Orthanc's own identifiers."""
        question = {"Level": level, "Query": query}
        return self.session.post(f"{self.rest}/tools/find", json=question, timeout=30).json()

    def file(self, instance: str) -> io.BytesIO:
        """An instance as it is stored, by Orthanc's own identifier."""
        answer = self.session.get(f"{self.rest}/instances/{instance}/file", timeout=30)
        answer.raise_for_status()
        return io.BytesIO(answer.content)

    def stop(self) -> None:
        """End the server and wait for it."""
        self.session.close()
        self._process.terminate()
        self._process.wait(30)
        self._log.close()
