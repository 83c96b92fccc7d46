"""``s4mil export``: a bundle's slide model as a step for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from s4mil_monai.cli.console import say
from s4mil_monai.cli.usage import UsageError

if TYPE_CHECKING:
    from s4mil_monai.streaming.manifest import StepManifest


LARGEST_CHUNK = 65_536


def export(
    bundle: str,
    *,
    to: str,
    precision: str = "float32",
    chunk: int = 2048,
    out: str | None = None,
    library: str | None = None,
    targets: str | None = None,
    features: str | None = None,
) -> int:
    """Export a bundle's slide model as one step of fixed shape; refused where its logits differ from the model's.

    Args:
        bundle: Folder of the trained model.
        to: onnx, tensorrt (writes the ONNX graph as well) or torchscript.
        precision: Of products: float32, float16 or bfloat16. State and logits are float32 always.
        chunk: Patches of a step, a multiple of 64.
        out: Folder of the files; the bundle's models by default, where scoring looks for them.
        library: tensorrt or tensorrt_rtx; the first that is installed by default.
        targets: Compute capabilities for TensorRT for RTX, such as 8.6,8.9; by default this
            machine's GPU, or 8.6, 8.9 and 12.0 where there is none.
        features: Folder of feature files (s4mil embed) whose slides are compared too, beside random ones.
    """
    if not 64 <= chunk <= LARGEST_CHUNK or chunk % 64:
        raise UsageError(f"--chunk is a multiple of 64 patches, at most {LARGEST_CHUNK}, got {chunk!r}")
    if to != "tensorrt" and (library or targets):
        raise UsageError("--library and --targets go with --to tensorrt")
    from s4mil_monai.models.bundle import load_bundle
    from s4mil_monai.models.seal import kept_sealed
    from s4mil_monai.streaming.export import export_step
    from s4mil_monai.streaming.real_bags import load_real_bags

    loaded = load_bundle(bundle)
    real = [] if features is None else load_real_bags(Path(features), loaded)
    with kept_sealed(Path(bundle)):
        written = export_step(
            loaded,
            Path(bundle) / "models" if out is None else Path(out),
            to=to,
            precision=precision,
            chunk=chunk,
            library=library,
            targets=None if targets is None else tuple(targets.replace(" ", "").split(",")),
            real_bags=real,
        )
    for exported in written:
        say(f"{exported.path}: {_describe(exported.manifest)}")
    return 0


def _describe(manifest: StepManifest) -> str:
    parity = manifest.parity
    built = manifest.tensorrt
    what = (
        manifest.kind
        if built is None
        else f"{built.library} {built.version} for {', '.join(built.compute_capabilities)}"
    )
    by = "" if built is None else " (of the graph; the engine itself is compared where it first runs)"
    return (
        f"{what}, {manifest.precision}, {manifest.shape.chunk} patches a step; logits within "
        f"{max(parity.logits, parity.patch_logits):.1e} over {parity.random_bags} random and {parity.real_bags} "
        f"real bags, at most {parity.bound:.0e}{by}"
    )
