"""``s4mil bundle``: a model of one's own, ready to score slides."""

from __future__ import annotations

from s4mil_monai.cli.console import say
from s4mil_monai.cli.usage import UsageError, require_positive


def bundle(training: str, *, out: str, features: str, classes: str, mpp: float = 0.5) -> int:
    """Make a bundle of a training, so that s4mil score, batch and the app can use it.

    Args:
        training: output_dir of a finished training of S4MIL.
        out: Folder of the bundle, which is named after it; it must not be there yet.
        features: Folder of the feature files that were trained on.
        classes: Names of the labels 0, 1, ..., separated by commas.
        mpp: Micrometres per pixel the patches were embedded at.
    """
    require_positive("mpp", mpp)
    names = tuple(name.strip() for name in classes.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--classes is two or more different names separated by commas, got {classes!r}")
    from s4mil_monai.training.new_bundle import make_bundle

    made = make_bundle(training, out, features=features, classes=names, mpp=mpp)
    say(f"{out}: {', '.join(made.classes)}, weights {made.weights.sha256[:12]}…, features of {made.encoder.name}")
    say(f"s4mil score SLIDE --bundle {out} scores with it; s4mil calibrate … --bundle {out} lets it decide")
    return 0
