"""Coded words of the DICOM results: the standard's own where it has them, else of a scheme of this package."""

from __future__ import annotations

import hashlib

from highdicom.sr import CodedConcept
from pydicom import Dataset

from s4mil_monai.result import SlideResult

SCHEME = "99S4MIL"
"""Private coding scheme; PS3.16 reserves designators that begin with 99."""

LONGEST_MEANING = 64
"""Of characters; of a code's value it is 16."""


def code(value: str, meaning: str, scheme: str = SCHEME) -> CodedConcept:
    """A coded concept; a longer meaning is cut."""
    return CodedConcept(value, scheme, meaning[:LONGEST_MEANING])


def as_item(value: str, scheme: str, meaning: str) -> Dataset:
    """A plain item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def model_code(result: SlideResult, meaning: str) -> CodedConcept:
    """What one model means by its words. Equal codes mean the same: the first half is the model's fingerprint."""
    return code(f"{(result.model.sha256 or 'none')[:8]}-{_digest(meaning)[:7]}", meaning)


def class_code(result: SlideResult, index: int) -> CodedConcept:
    """A class of the model, by its place among the logits."""
    return model_code(result, result.classes[index])


def reason_code(reason: str) -> CodedConcept:
    """Why there is no score, a code of its own for each wording."""
    return code(f"reason-{_digest(reason)[:9]}", reason)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
