"""SlideMeasures: the few numbers of a scored slide by which one batch of slides is compared with another."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SlideMeasures(BaseModel):
    """What scanner, laboratory, encoder and model made of one slide; nothing tells whose slide it was.

    Stain and light follow the laboratory and the scanner. The features' numbers follow focus and how the encoder
    computes, and hardly the stain: on one real slide, blur of 1.5 px raised the share of zeros by a tenth, while a
    stain 1.4 times as dense moved none by more than 1 %. Scores follow all of these, and the mix of patients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tissue_brightness: float = Field(ge=0, le=1)
    """Mean of red, green and blue on tissue, 0 to 1."""
    glass_brightness: float | None = Field(ge=0, le=1)
    """The same on empty glass; None where tissue fills the scan."""
    saturation: float = Field(ge=0, le=1)
    """Mean saturation of tissue, 0 (grey) to 1."""
    haematoxylin_od: float
    """Mean optical density of haematoxylin on tissue, log10."""
    eosin_od: float
    """Mean optical density of eosin on tissue, log10."""
    sharpness: float | None = Field(ge=0)
    """Detail of 1 px over detail of 2 px, median of sampled patches; None where none has contrast."""
    tissue_share: float = Field(ge=0, le=1)
    """Share of the scanned area that is tissue."""
    patches: float = Field(ge=1)
    """How many the model read."""
    feature_mean: float
    """Of all features of all patches. With the deviation it gives their norm, which is therefore left out."""
    feature_deviation: float = Field(ge=0)
    """Standard deviation of all features of all patches."""
    feature_zero_share: float = Field(ge=0, le=1)
    """Share of features that are exactly 0, which rectifying encoders give for what a patch does not show."""
    feature_likeness: float = Field(ge=0, le=1)
    """How alike patches are: norm of the mean patch over the mean norm of patches; 1 where all are the same."""
    score: float = Field(ge=0, le=1)
    """Probability of the last class, before calibration: a new calibration shifts no slide against another, and
    would pass for drift."""
    top_share: float = Field(ge=0, le=1)
    """Of all patches' contributions to the predicted class's logit, by size, the share of the largest."""
    probable_patches: float = Field(ge=0, le=1)
    """Share of patches whose own probability of the last class is above 0.5."""


MEASURES: tuple[str, ...] = tuple(SlideMeasures.model_fields)
"""Their names, in order."""
