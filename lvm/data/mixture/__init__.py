"""From stores to token batches: recipes, sampling, mixture, packing and loader."""
