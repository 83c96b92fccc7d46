"""Errors keep their facts and survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from s4mil_monai import errors
from s4mil_monai.extras import require

EXAMPLES = [
    errors.SlideError("a.svs", "reason"),
    errors.UnknownResolutionError(slide="a.svs", reason="reason"),
    errors.TooCoarseError("a.svs", "reason", found_mpp=2.93, wanted_mpp=0.5),
    errors.WeightsError("w.pt", "reason"),
    errors.ConfigRefusedError("train.yaml", "reason", place="run::0", found="$evil"),
    errors.UnknownNameError("encoder", "x", ("a", "b")),
    errors.MissingExtraError(module="cucim", extra="cucim"),
    errors.MisfitError("step.onnx", "reason", found="this", wanted="that"),
    errors.ChunkWidthError((5, 7), 24),
    errors.NotFiniteError(207),
    errors.StreamEndedError(5),
    errors.EmptyStreamError(),
    errors.OverflowedError("float16"),
    errors.TooFewSlidesError("a drift reference", found=3, wanted=30),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_comes_back_from_pickling_with_its_facts_and_its_text(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert back.__dict__ == error.__dict__
    assert str(back) == str(error)


def test_unknown_name_lists_the_known_ones():
    assert str(errors.UnknownNameError("encoder", "x", ("a", "b"))) == "unknown encoder 'x'; known: a, b"


def test_missing_library_names_the_extra_to_install():
    with pytest.raises(errors.MissingExtraError, match=r"pip install 's4mil-monai\[dicom\]'"):
        require("no_such_library_at_all", extra="dicom")
