"""Sources, streams, scenes, recipes, mixtures, rows: from files to token batches."""
