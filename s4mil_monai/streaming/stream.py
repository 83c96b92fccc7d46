"""SlideStream: features in, in pieces of any size; the slide's score out, at any time and at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s4mil_monai.errors import ChunkWidthError, EmptyStreamError, NotFiniteError, OverflowedError, StreamEndedError
from s4mil_monai.models.s4mil import S4MILOutput
from s4mil_monai.streaming.runtime import Runtime


@dataclass(frozen=True)
class SoFar:
    """A slide's score while it is being read: that of the slide that ends here, not a guess at the rest."""

    patches: int
    probabilities: tuple[float, ...]


class SlideStream:
    """One slide's features, read chunk by chunk as they come.

    Args:
        runtime: What runs the step. Several streams of one runtime share its weights.

    ``patches_read`` of those that came are in the score so far; the others wait for a full chunk, or for the end.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime  # holds the weights
        self._shape = runtime.shape
        self._slide = runtime.open()
        self._waiting: list[Tensor] = []
        self._patch_logits: list[Tensor] = []
        self._seen, self.patches_read = 0, 0
        self._ended = False

    def add(self, features: Tensor) -> None:
        """Take the (n, D) features of the next patches, n of any size; they are read once a chunk is full.

        They are kept until then, not copied: do not change them.

        Raises:
            StreamEndedError: The stream has ended.
            ChunkWidthError: Features of another width.
            NotFiniteError: NaN or infinity among them. The stream stays as it was.
        """
        if self._ended:
            raise StreamEndedError(self._seen)
        if features.ndim != 2 or features.shape[1] != self._shape.in_features:
            raise ChunkWidthError(tuple(features.shape), self._shape.in_features)
        if len(features) == 0:
            return
        features = features.detach().float()
        self._check_finite(features)
        self._waiting.append(features)
        self._seen += len(features)
        if self._seen - self.patches_read >= self._shape.chunk:
            self._read_full_chunks()

    def so_far(self) -> SoFar | None:
        """The score of what was read; None before the first full chunk."""
        if self.patches_read == 0:
            return None
        return SoFar(self.patches_read, tuple(self._slide.maxima().logits.softmax(0).tolist()))

    def finish(self) -> S4MILOutput:
        """Read what is left and end the stream.

        Returns:
            The output of the model for a batch of this one slide, on the CPU.

        Raises:
            StreamEndedError: It has ended before.
            EmptyStreamError: No patch ever came.
            OverflowedError: The score is not a number.
        """
        if self._ended:
            raise StreamEndedError(self._seen)
        if self._seen == 0:
            raise EmptyStreamError
        self._ended = True
        if self._waiting:
            self._read_chunk(_join(self._waiting))
            self._waiting = []
        found, patch_logits = self._slide.maxima(), torch.cat(self._patch_logits)
        if not bool(found.logits.isfinite().all() and patch_logits.isfinite().all()):
            raise OverflowedError(self._runtime.precision)
        return S4MILOutput(
            logits=found.logits.unsqueeze(0),
            patch_logits=patch_logits.unsqueeze(0),
            pooled=found.running_max.unsqueeze(0),
            winners=found.winners.unsqueeze(0),
        )

    def _read_full_chunks(self) -> None:
        *full, rest = _split(_join(self._waiting), self._shape.chunk)
        for chunk in full:
            self._read_chunk(chunk)
        self._waiting = [rest] if len(rest) else []

    def _read_chunk(self, chunk: Tensor) -> None:
        self._patch_logits.append(self._slide.read(chunk))
        self.patches_read += len(chunk)

    def _check_finite(self, features: Tensor) -> None:
        # one pass without a copy: the sum is finite only if all is; in float32, for half precision overflows
        if not bool(torch.isfinite(features.sum(dtype=torch.float32))):
            bad = ~torch.isfinite(features).all(1)
            if bad.any():  # finite numbers too can add up to infinity
                raise NotFiniteError(self._seen + int(bad.nonzero()[0]))


def _join(pieces: list[Tensor]) -> Tensor:
    """All pieces as one; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _split(features: Tensor, chunk: int) -> list[Tensor]:
    """Full chunks, and the rest, which may be empty."""
    full = len(features) // chunk * chunk
    return [*features[:full].split(chunk), features[full:]] if full else [features]
