"""The process that touches slide files: a decoder that crashes, hangs or eats memory takes only this one down.

Started by :mod:`s4mil_monai.slides.isolation` as ``python -m s4mil_monai.slides.read_server CHANNEL MEMORY``: file
descriptors of a socket that carries one JSON object a line each way, and of shared memory that carries pixels.
"""

from __future__ import annotations

import json
import mmap
import resource
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from s4mil_monai.errors import MissingExtraError, SlideError
from s4mil_monai.geometry import Level
from s4mil_monai.slides.overrides import Override, Overrides
from s4mil_monai.slides.reader import BACKENDS, fitting_backends, open_with
from s4mil_monai.slides.resolution import find_resolution
from s4mil_monai.slides.slide import Slide

OPEN_AT_ONCE = 4
"""Slides a process keeps open; the one used longest ago goes first."""

GRACE_S = 10
"""A parent that is alive ends a request at its limit; an orphan ends itself this much later."""


class ReadServer:
    """Answers requests about slides, one after the other."""

    def __init__(self, memory: mmap.mmap):
        self._memory = memory
        self._slides: OrderedDict[tuple[str, str], Slide] = OrderedDict()
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "backends": self._backends,
            "open": self._open,
            "resolution": self._resolution,
            "read": self._read,
            "forget": lambda request: {},
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; whatever goes wrong becomes part of the answer."""
        try:
            for path in request["forget"]:
                self._forget(path)
            return self._operations[request["do"]](request)
        except SlideError as error:
            return {"refused": type(error).__name__, "reason": error.reason}
        except MissingExtraError as error:
            return {"failed": str(error)}
        except MemoryError:
            return {"failed": "wants more memory than a reader may have"}
        except Exception as error:
            return {"failed": " ".join(str(error).split()) or type(error).__name__}

    def _backends(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"backends": list(fitting_backends(Path(request["path"])))}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        slide = open_with(request["backend"], Path(request["path"]))
        self._keep(request, slide)
        levels = [[level.size_px, level.downsample, level.number] for level in slide.levels]
        return {"levels": levels, "notes": slide.notes}

    def _resolution(self, request: dict[str, Any]) -> dict[str, Any]:
        slide = self._find(request)
        before = slide.notes  # the slide stays open; the next request has its own overrides
        overrides = Overrides(tuple(Override(**row) for row in request["overrides"]))
        found = find_resolution(slide, assume_mpp=request["assume_mpp"], overrides=overrides)
        notes, slide.notes = slide.notes, before
        return {
            "resolution": None if found is None else [found.mpp, found.source],
            "magnification": slide.magnification,
            "notes": notes,
        }

    def _read(self, request: dict[str, Any]) -> dict[str, Any]:
        slide = self._find(request)
        level = as_level(request["level"])
        x, y, width, height = request["region"]
        target = np.frombuffer(self._memory, np.uint8, height * width * 3).reshape(height, width, 3)
        target[:] = slide.read_inside(x, y, width, height, level)
        return {}

    def _find(self, request: dict[str, Any]) -> Slide:
        key = (request["path"], request["backend"])
        if key not in self._slides:  # another process opened it before
            self._keep(request, BACKENDS[request["backend"]](Path(request["path"])))
        self._slides.move_to_end(key)
        return self._slides[key]

    def _keep(self, request: dict[str, Any], slide: Slide) -> None:
        key = (request["path"], request["backend"])
        if key in self._slides:
            self._slides.pop(key).close()
        self._slides[key] = slide
        while len(self._slides) > OPEN_AT_ONCE:
            self._slides.popitem(last=False)[1].close()

    def _forget(self, path: str) -> None:
        for key in [key for key in self._slides if key[0] == path]:
            self._slides.pop(key).close()


def as_level(parts: list[Any]) -> Level:
    """A level from its JSON form: size, downsample, number."""
    (width, height), downsample, number = parts
    return Level((width, height), downsample, number)


def serve(channel: socket.socket, memory: mmap.mmap) -> None:
    """Say that all is imported, then answer until the other end is closed."""
    server = ReadServer(memory)
    channel.sendall(b"{}\n")
    with channel.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            # its default action ends the process, even inside a library that never comes back
            signal.alarm(int(request["limit_s"]) + GRACE_S)
            reply = server.answer(request)
            signal.alarm(0)
            channel.sendall(json.dumps(reply).encode() + b"\n")


def main() -> None:
    """Take the descriptors from the command line and serve."""
    channel, memory, max_bytes = (int(argument) for argument in sys.argv[1:4])
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # cuCIM loads CuPy if it is there: 200 MB that reading on the CPU has no use for
    sys.modules["cupy"] = None  # type: ignore[assignment]
    with socket.socket(fileno=channel) as connection, mmap.mmap(memory, 0) as buffer:
        serve(connection, buffer)


if __name__ == "__main__":
    main()
