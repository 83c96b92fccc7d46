"""Slides out of a PACS, results back into it: DICOMweb, and C-STORE for the way back."""
