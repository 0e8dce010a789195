"""Data pipeline: image sources, streams, stores, recipes, mixtures, packed rows and token batches."""
