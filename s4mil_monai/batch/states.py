"""What a job can be, and what it can become."""

from __future__ import annotations

from enum import Enum


class JobState(str, Enum):
    """State of a job: one slide to be scored by one model with one set of settings."""

    WAITING = "waiting"
    RUNNING = "running"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    RETRY = "retry"
    QUARANTINED = "quarantined"

    @property
    def sentence(self) -> str:
        """What it means, for a person."""
        return _SENTENCES[self]


_SENTENCES = {
    JobState.WAITING: "The slide is there and whole; nobody has begun with it.",
    JobState.RUNNING: "A scheduler has the slide, under a lease that it renews.",
    JobState.PUBLISHING: "The result is written and its checksums are recorded; it is about to get its name.",
    JobState.PUBLISHED: "The result is in its folder; the job is done for good.",
    JobState.RETRY: "A try failed; there will be another after a while.",
    JobState.QUARANTINED: "It was given up for the reason given; `s4mil batch retry` tries it again.",
}

FROM: dict[JobState, tuple[JobState, ...]] = {
    JobState.WAITING: (JobState.RUNNING, JobState.PUBLISHING, JobState.RETRY, JobState.QUARANTINED),
    JobState.RUNNING: (JobState.WAITING, JobState.RETRY),
    JobState.PUBLISHING: (JobState.RUNNING,),
    JobState.PUBLISHED: (JobState.PUBLISHING,),
    JobState.RETRY: (JobState.RUNNING, JobState.PUBLISHING),
    JobState.QUARANTINED: (JobState.WAITING, JobState.RUNNING, JobState.PUBLISHING, JobState.RETRY),
}
"""For each state, those it can be reached from; a job begins as waiting, and published is the end."""

HELD = (JobState.RUNNING, JobState.PUBLISHING)
"""Under a lease."""
CLAIMABLE = (JobState.WAITING, JobState.RETRY)
"""A scheduler may take them, in this order; those that failed, when their time has come."""

FAILED = (JobState.RETRY, JobState.QUARANTINED)
"""What a failed try leads to."""
