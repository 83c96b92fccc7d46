"""RayExecutor: scores on the machines of a Ray cluster.

Two kinds of actors divide a slide between them. *Reading* actors (:mod:`.reading_actor`), placed by CPU, have one
slide each: they open it, find its tissue, judge its quality, read its patches and in the end write its result.
*Embedding* actors (:mod:`.embedding_actor`), placed by GPU where the cluster has any, hold encoder and slide model
and score several slides at once, each from another reading actor, so that one slow disk keeps no GPU waiting.
Patches go through Ray's object store as bytes, a few batches of each slide at a time: an embedding actor asks for
as much as it can take, which keeps memory flat whatever the slides' size.

Only this process, the driver, knows the ledger. It gives each slide to one actor of each kind and hears what
became of it; results are written below the shared ``out`` into a folder named by the lease, and only the driver
gives them their names. When an actor or its machine dies, its slides come back as :class:`Lost`, the other actor
that had them is ended too, and new ones are made on what is left of the cluster. A process that lives on after its
machine was declared dead can do no harm: the folder it writes to belongs to a lease that nobody publishes.

The machines see slides, model and ``out`` under the same paths, and have this package in the same version.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from s4mil_monai.batch.ray_cluster import HERE, Cluster, Plan, import_ray, plan_actors
from s4mil_monai.batch.ray_crew import Crew, Member
from s4mil_monai.batch.work import Began, Event, Executor, Lost, Work, WorkerSettings
from s4mil_monai.errors import ClusterError, S4MilError, first_line

SLIDES_AT_ONCE = 3
"""Of an embedding actor, and so reading actors for each: one prepares, one gives patches, one writes."""

BALANCE_S = 5.0
"""How often the cluster is looked at for machines that came or went."""

PATIENCE_S = 300.0
"""How long a cluster without room for a single actor is waited for."""

DROP_S = 10.0
"""How long an embedding actor has to let go of a slide whose reading actor was ended; then it is ended as well."""


@dataclass(eq=False)
class _InHand:
    work: Work
    reader: Member
    embedder: Member
    begin: Any
    """Reference; None once it was answered."""
    outcome: Any
    """Reference."""
    dropped: float | None = None
    """On the monotonic clock."""


class RayExecutor(Executor):
    """Scores on a cluster."""

    def __init__(
        self, settings: WorkerSettings, *, workers: int = 1, address: str | None = None, readers: int | None = None
    ):
        """Prepare to join a cluster.

        Args:
            settings: Of the model each embedding actor holds.
            workers: Embedding actors, if there is room for so many.
            address: Of the cluster: ``host:port`` or ``auto`` on one of its machines, ``ray://host:port`` from
                elsewhere. None starts one on this machine, which ends with the run.
            readers: Reading actors; three for each embedding one by default.
        """
        self._settings, self._workers, self._address = settings, workers, address
        self._readers = readers or SLIDES_AT_ONCE * workers
        self._cluster: Cluster | None = None
        self._waiting: list[Work] = []
        self._told: list[Event] = []
        self._in_hand: dict[str, _InHand] = {}

    # Cluster ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Join the cluster, and wait until one actor of each kind is ready; others may come later.

        Raises:
            ClusterError: It cannot be reached, or has no room.
            MissingExtraError: Ray is not installed.
            S4MilError: The model cannot be loaded.
        """
        if self._cluster is not None:
            return
        self._cluster = Cluster(self._address)
        self._ray = import_ray()
        self._embedding = Crew(self._ray, slides=SLIDES_AT_ONCE)
        self._reading = Crew(self._ray, slides=1)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        plan = self._balance()
        if not (plan.embedding and plan.reading):
            missing = "GPU" if plan.on_gpus and not plan.embedding else "CPU"
            raise ClusterError(self._address or HERE, f"has no {missing} to score with; see `ray status`")
        while not (self._embedding.ready and self._reading.ready):
            self._take_answers(self._wait(self._loading(), 1.0))
            self._balance_if_due()
            for crew in self._crews:
                if isinstance(crew.error, S4MilError):
                    raise crew.error
            if self._hopeless:
                raise ClusterError(self._address or HERE, self._hopeless)

    @property
    def _crews(self) -> tuple[Crew, Crew]:
        return self._embedding, self._reading

    @property
    def _hopeless(self) -> str | None:
        """Why nothing will be scored any more."""
        for crew, kind in zip(self._crews, ("embeds", "reads"), strict=True):
            if crew.is_hopeless:
                return f"no actor that {kind} gets ready: {crew.error}"
            if crew.without_s > PATIENCE_S:
                return f"no room for an actor that {kind} in {PATIENCE_S:g} s; see `ray status`"
        return None

    def _balance_if_due(self) -> None:
        if time.monotonic() - self._balanced > BALANCE_S:
            self._balance()

    def _balance(self) -> Plan:
        """Make actors as there is room for, on the machines that are there now."""
        assert self._cluster is not None
        self._balanced = time.monotonic()
        device = self._settings.device
        plan = plan_actors(self._cluster.nodes(), workers=self._workers, readers=self._readers, device=device)
        self._embedding.fill_up(plan.embedding, lambda: self._make_embedder(plan))
        self._reading.fill_up(plan.reading, lambda: self._make_reader(plan))
        return plan

    def _make_embedder(self, plan: Plan) -> Any:
        from s4mil_monai.batch.embedding_actor import EmbeddingActor

        assert self._cluster is not None
        return self._cluster.make_actor(
            EmbeddingActor,
            plan,
            on_gpu=plan.on_gpus,
            threads=SLIDES_AT_ONCE + 1,
            arguments=(self._settings,),
        )

    def _make_reader(self, plan: Plan) -> Any:
        from s4mil_monai.batch.reading_actor import ReadingActor

        assert self._cluster is not None
        return self._cluster.make_actor(ReadingActor, plan, on_gpu=False, threads=1, arguments=(self._settings,))

    # Work -------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more slides it takes now; one at least where it has none, which waits for actors to come."""
        if self._waiting or self._cluster is None:
            return 0
        return max(min(self._embedding.room(), self._reading.room()), 0 if self._in_hand else 1)

    def submit(self, work: Work) -> None:
        """Take a slide, which waits until an actor of each kind is free."""
        self._waiting.append(work)
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            embedder = self._embedding.choose(alone=self._waiting[0].alone)
            reader = self._reading.choose(alone=False)
            if embedder is None or reader is None:
                return
            self._send(self._waiting.pop(0), reader, embedder)

    def _send(self, work: Work, reader: Member, embedder: Member) -> None:
        for member in (reader, embedder):
            member.leases.add(work.lease)
            member.is_alone = work.alone
        begin = reader.handle.begin.remote(work.lease)
        outcome = embedder.handle.score.remote(work, reader.handle)
        self._in_hand[work.lease] = _InHand(work, reader, embedder, begin, outcome)

    def poll(self, timeout_s: float) -> list[Event]:
        """What has happened, waiting for it at most so long."""
        if self._cluster is None or not (self._in_hand or self._waiting):
            time.sleep(timeout_s)
            return self._take_told()
        done = self._wait([*self._loading(), *self._answers()], 0.0 if self._told else timeout_s)
        self._take_answers(done)
        self._take_events(done)
        self._balance_if_due()
        self._end_the_stuck()
        self._send_waiting()
        if self._hopeless:
            self._give_up_waiting(self._hopeless, of_the_machine=True)
        return self._take_told()

    def _wait(self, refs: list[Any], timeout_s: float) -> set[Any]:
        if not refs:
            time.sleep(timeout_s)
            return set()
        self._ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        return set(self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])

    def _loading(self) -> list[Any]:
        return [ref for crew in self._crews for ref in crew.loading()]

    def _answers(self) -> list[Any]:
        refs = [ref for hand in self._in_hand.values() for ref in (hand.begin, hand.outcome)]
        return [ref for ref in refs if ref is not None]

    def _take_answers(self, done: set[Any]) -> None:
        for crew in self._crews:
            crew.take_answers(done)

    def _take_events(self, done: set[Any]) -> None:
        for hand in list(self._in_hand.values()):
            if hand.begin in done and hand.work.lease in self._in_hand:
                self._take_begin(hand)
            if hand.outcome in done and hand.work.lease in self._in_hand:
                self._take_outcome(hand)

    def _take_begin(self, hand: _InHand) -> None:
        try:
            self._told.append(Began(self._ray.get(hand.begin)))
            hand.begin = None
        except self._ray.exceptions.RayError as error:
            self._lose(hand.reader, f"the actor that reads is gone ({first_line(error)})")

    def _take_outcome(self, hand: _InHand) -> None:
        try:
            event = self._ray.get(hand.outcome)
        except self._ray.exceptions.RayError as error:
            self._lose(hand.embedder, f"the actor that embeds is gone ({first_line(error)})")
            return
        if isinstance(event, Lost):
            self._lose(hand.reader, event.reason)
        else:
            self._told.append(event)
            self._forget(hand)

    def _lose(self, member: Member, reason: str) -> None:
        """All slides of an actor that is gone are lost; a reading actor without its partner ends too."""
        # a machine that is gone says nothing of the slides it had
        shared = len(member.leases) > 1 or "node has died" in reason
        for hand in [self._in_hand[lease] for lease in member.leases]:
            self._told.append(Lost(hand.work.lease, reason, shared=shared))
            self._forget(hand)
            self._reading.lose(hand.reader)
        for crew in self._crews:
            crew.lose(member)
        self._balance()

    def _forget(self, hand: _InHand) -> None:
        del self._in_hand[hand.work.lease]
        for member in (hand.reader, hand.embedder):
            member.leases.discard(hand.work.lease)
            member.is_alone = False

    # Ends -------------------------------------------------------------------------------------------------------

    def drop(self, lease: str) -> None:
        """End the actor that reads a slide, and the one that embeds it, should it not let go."""
        for work in [one for one in self._waiting if one.lease == lease]:
            self._waiting.remove(work)
            self._told.append(Lost(lease, "was not begun"))
        if lease in self._in_hand:
            self._in_hand[lease].dropped = time.monotonic()
            self._ray.kill(self._in_hand[lease].reader.handle)

    def _end_the_stuck(self) -> None:
        for hand in self._in_hand.values():
            if hand.dropped is not None and time.monotonic() - hand.dropped > DROP_S:
                self._ray.kill(hand.embedder.handle)  # its outcomes say so

    def _give_up_waiting(self, reason: str, *, of_the_machine: bool = False) -> None:
        self._told += [Lost(work.lease, reason, of_the_machine) for work in self._waiting]
        self._waiting.clear()

    def _take_told(self) -> list[Event]:
        told, self._told = self._told, []
        return told

    def stop(self) -> list[Event]:
        """End all actors, and the cluster if it was started here; gives what they had still to tell."""
        cluster, self._cluster = self._cluster, None
        self._give_up_waiting("was not begun")
        if cluster is None:
            return self._take_told()
        refs = self._answers()
        if refs:
            self._take_last_events(set(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]))
        self._told += [Lost(lease, "the actor that had it was ended") for lease in self._in_hand]
        self._in_hand.clear()
        for crew in self._crews:
            for member in list(crew.members):
                crew.lose(member)
        cluster.leave()
        return self._take_told()

    def _take_last_events(self, done: set[Any]) -> None:
        for hand in list(self._in_hand.values()):
            if hand.outcome in done:
                with suppress(self._ray.exceptions.RayError):
                    self._told.append(self._ray.get(hand.outcome))
                    self._forget(hand)
