"""SlideResult → files."""
