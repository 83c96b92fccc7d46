"""``s4mil import-checkpoint``: models of the original authors."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.cli.console import say
from s4mil_monai.cli.usage import UsageError


def import_checkpoint(checkpoint: str, *, out: str) -> int:
    """Read a checkpoint of the original authors' S4Model, CLAM_SB, CLAM_MB or TransMIL; write it for this package.

    Args:
        checkpoint: Their .pt, .pth or .safetensors file.
        out: A .safetensors file with our parameter names, kind and settings.
    """
    from s4mil_monai.models.checkpoints import import_checkpoint as read
    from s4mil_monai.models.checkpoints import save_imported

    if not out.endswith(".safetensors"):
        raise UsageError(f"--out is a .safetensors file, got {out}")
    imported = read(checkpoint)
    save_imported(imported, Path(out))
    described = ", ".join(f"{name} {value}" for name, value in imported.settings.items())
    say(f"{checkpoint}: {imported.kind} ({described}), written to {out}")
    return 0
