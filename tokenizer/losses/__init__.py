"""Losses of reconstructed images: differences of pixels and structure, of features of a classifier, and adversarial."""
