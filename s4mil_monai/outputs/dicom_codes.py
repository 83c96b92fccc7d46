"""Coded words of the DICOM results: the standard's own where it has them, else of a scheme of this package."""

from __future__ import annotations

from highdicom.sr import CodedConcept
from pydicom import Dataset

SCHEME = "99S4MIL"
"""Private coding scheme; PS3.16 reserves designators that begin with 99."""

LONGEST_MEANING = 64


def code(value: str, meaning: str, scheme: str = SCHEME) -> CodedConcept:
    """A coded concept; a longer meaning is cut."""
    return CodedConcept(value, scheme, meaning[:LONGEST_MEANING])


def as_item(value: str, scheme: str, meaning: str) -> Dataset:
    """A plain item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def class_code(classes: tuple[str, ...], index: int) -> CodedConcept:
    """The class of a model, by its place among the logits."""
    return code(f"class-{index}", classes[index])


THRESHOLD = code("threshold", "Calibrated probability from which on a slide is positive")
PATCH_PROBABILITY = code("patch-prob", "Probability of the class if one patch held every maximum")
LARGEST = code("largest-prob", "Largest patch probability in the region")
SHARE = code("logit-share", "Exact share of the logit of the class")
PREDICTED = code("predicted", "Most probable class")
DECISION = code("decision", "Decision by the calibrated threshold")
STATUS = code("status", "Status of the score")
REASON = code("reason", "Why there is no score")
QUALITY = code("quality", "Fitness of the slide for scoring")
NO_UNITS = CodedConcept("1", "UCUM", "no units")

DECISIONS = {
    "positive": code("10828004", "Positive", "SCT"),
    "negative": code("260385009", "Negative", "SCT"),
    "refer": code("refer", "Refer to a pathologist"),
    "rejected": code("rejected", "Rejected for its quality"),
}
PROCEDURE = code("slide-scoring", "Scoring of a whole slide image")
MORPHOLOGY = CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")
