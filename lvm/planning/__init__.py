"""A step on devices that aren't there: compiled, read, and judged."""
