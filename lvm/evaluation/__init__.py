"""Evaluation: perplexity, prompted tasks, metrics, and a page to read them on."""
