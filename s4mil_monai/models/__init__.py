"""Vectors → predictions: bag models, and the bundles that carry trained ones."""
