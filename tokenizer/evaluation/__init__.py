"""Quality of a tokenizer's reconstructions and use of its codebook, measured in one pass over an image source."""
