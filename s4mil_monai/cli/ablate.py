"""``s4mil ablate``: what the score would be without some patches."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.cli.console import say
from s4mil_monai.cli.options import shipped_bundle
from s4mil_monai.cli.usage import UsageError


def ablate(
    folder: str,
    *,
    patches: str | None = None,
    top: int | None = None,
    region: str | None = None,
    bundle: str | None = None,
) -> int:
    """Score a slide again without some of its patches; nothing is written.

    Args:
        folder: What s4mil score wrote for the slide.
        patches: Indices of patches to leave out, such as 3,17,18; result.json has them.
        top: How many of the deciding patches to leave out, largest share first.
        region: Rectangle x,y,width,height in level-0 pixels; patches that overlap it are left out.
        bundle: Folder of the model that scored the slide; the shipped demonstration model by default.
    """
    if [patches, top, region].count(None) != 2:
        raise UsageError("ablate needs one of --patches, --top and --region")
    listed = None if patches is None else _whole_numbers("patches", patches)
    rectangle = None if region is None else _whole_numbers("region", region)
    if rectangle is not None and (len(rectangle) != 4 or min(rectangle[2:]) < 1):
        raise UsageError(f"--region is x,y,width,height, got {region!r}")
    if top is not None and top < 1:
        raise UsageError(f"--top is a number of patches, got {top!r}")
    from s4mil_monai.ablation import patches_in_region, read_scored, score_without, top_patches
    from s4mil_monai.models.bundle import load_bundle
    from s4mil_monai.streaming.torch_runtime import TorchRuntime

    loaded = load_bundle(bundle or shipped_bundle())
    scored = read_scored(Path(folder), loaded)
    if rectangle is not None:
        left, upper, width, height = rectangle
        listed = patches_in_region(scored, left=left, top=upper, width=width, height=height)
    elif top is not None:
        listed = top_patches(scored, top)
    found = score_without(scored, TorchRuntime(loaded.model), listed or [], name=folder)
    name = scored.result.slide.name
    say(f"{name}: {found.left_out} of {found.patches} patches left out")
    for label, before, after in zip(scored.result.classes, found.before, found.after, strict=True):
        say(f"{name}: {label}, probability {before:.3f} with them, {after:.3f} without")
    return 0


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.strip("[]() ").split(",")]
    except ValueError as error:
        raise UsageError(f"--{option} is a list of whole numbers, such as 3,17, got {text!r}") from error
