"""Crew: the actors of one kind, those that are ready, those that are still to come, and those that are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from s4mil_monai.errors import S4MilError, first_line

logger = logging.getLogger(__name__)

STRIKES = 3
"""After so many actors in a row that could not load what they need, no more are made."""


@dataclass(eq=False)
class Member:
    """One actor."""

    handle: Any
    loading: Any
    """Reference to the answer of its ``load``; None once it is ready."""
    leases: set[str] = field(default_factory=set)
    """Slides it has."""
    is_alone: bool = False
    """One of them wants nobody beside it."""


class Crew:
    """Actors of one kind."""

    def __init__(self, ray: Any, *, slides: int):
        """An empty crew.

        Args:
            ray: The library.
            slides: How many an actor takes at once.
        """
        self._ray, self._slides = ray, slides
        self.members: list[Member] = []
        self.error: S4MilError | str | None = None
        """Why the last one could not be made ready."""
        self._strikes = 0
        self._without_since = time.monotonic()

    @property
    def ready(self) -> list[Member]:
        """Those that have loaded what they need."""
        return [member for member in self.members if member.loading is None]

    @property
    def is_hopeless(self) -> bool:
        """Whether none is left, and none will come."""
        return not self.members and self._strikes >= STRIKES

    @property
    def without_s(self) -> float:
        """Seconds for which no actor has been ready."""
        return 0.0 if self.ready else time.monotonic() - self._without_since

    def room(self) -> int:
        """How many more slides it takes."""
        return sum(self._room_of(member) for member in self.ready)

    def _room_of(self, member: Member) -> int:
        return 0 if member.is_alone else self._slides - len(member.leases)

    def choose(self, *, alone: bool) -> Member | None:
        """The actor that has least to do; None where none has room, or none is empty for a slide that is alone."""
        free = [member for member in self.ready if self._room_of(member) > 0 and not (alone and member.leases)]
        return min(free, key=lambda member: len(member.leases), default=None)

    def fill_up(self, wanted: int, make: Callable[[], Any]) -> None:
        """Make actors until there are as many as wanted, or end some that have nothing to do."""
        while len(self.members) < wanted and self._strikes < STRIKES:
            handle = make()
            self.members.append(Member(handle, handle.load.remote()))
        # those that wait for a place first
        idle = sorted((one for one in self.members if not one.leases), key=lambda one: one.loading is None)
        for member in idle[: max(0, len(self.members) - wanted)]:
            self.lose(member)

    def loading(self) -> list[Any]:
        """References to the answers that are waited for."""
        return [member.loading for member in self.members if member.loading is not None]

    def take_answers(self, done: set[Any]) -> None:
        """See who has got ready, or cannot."""
        for member in [one for one in self.members if one.loading in done]:
            try:
                answer = self._ray.get(member.loading)
            except self._ray.exceptions.RayError as error:
                answer = first_line(error)
            if answer is None:
                member.loading, self._strikes = None, 0
                continue
            self.error = answer
            self._strikes += 1
            logger.warning("an actor could not be made ready: %s", answer, extra={"event": "actor_failed"})
            self.lose(member)

    def lose(self, member: Member) -> None:
        """Forget an actor, and end it should it still be there."""
        if member not in self.members:
            return
        self.members.remove(member)
        self._ray.kill(member.handle)
        if member.loading is None and not self.ready:
            self._without_since = time.monotonic()
