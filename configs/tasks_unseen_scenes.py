"""Scenes of the kinds of configs/tasks_scenes.py that neither tokenizer nor transformer sees, to evaluate on."""

from ml_collections import ConfigDict

from configs import tasks_scenes


def get_config() -> ConfigDict:
    """Another seed; 900 scenes, so that intervals are narrow enough to tell one example from four."""
    config = tasks_scenes.get_config()
    config.update(seed=1, num_scenes=900)
    return config
