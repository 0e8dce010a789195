"""Errors, logging, configuration, command-line and file helpers that every other package may import."""
