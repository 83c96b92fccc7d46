"""Copy a bundle into a folder of models, with checksums, as the application wants it.

python -m deploy.stage_models --bundle bundles/s4mil_slide --out build/models
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from s4mil_monai.errors import S4MilError
from s4mil_monai.models.manifest import stage_models


def main() -> int:
    """Stage the models; gives the exit code."""
    parser = argparse.ArgumentParser(description="Copy a bundle into a folder of models with checksums.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder_weights", type=Path, help="where the encoder's weights come with no package")
    given = parser.parse_args()
    try:
        staged = stage_models(given.bundle, given.out, encoder_weights=given.encoder_weights)
    except S4MilError as error:
        print(f"stage_models: {error}", file=sys.stderr)
        return 1
    print(f"{staged.bundle.name}, with SHA256SUMS, in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
