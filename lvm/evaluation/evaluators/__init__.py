"""Evaluators: each module has one, whose `kind` is the module's name."""
