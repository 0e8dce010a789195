"""One loop for both models."""
