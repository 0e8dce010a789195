"""What a model knows: perplexity, prompted tasks, metrics, and a page to read them on."""
