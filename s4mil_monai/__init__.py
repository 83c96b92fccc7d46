"""Whole slide images in, slide-level diagnosis support out. Research use; not cleared for diagnosis.

Importing the package imports nothing heavy; take what you need from its modules, for example
``from s4mil_monai.slides.reader import open_slide``.
"""

__version__ = "0.1.0"
