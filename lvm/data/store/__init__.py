"""The scene store: format, reader and writer."""
