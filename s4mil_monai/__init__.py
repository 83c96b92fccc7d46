"""Whole slide images in, slide-level diagnosis support out. Research use; not cleared for diagnosis.

Importing the package imports nothing heavy; take what you need from its modules, for example
``from s4mil_monai.slides.reader import open_slide``.
"""

import os

# ONNX Runtime's official builds report to their maker unless this is set before it is imported, as MONAI does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
