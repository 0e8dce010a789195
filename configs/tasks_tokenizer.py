"""Tokenizer of configs/tasks_lvm.py: the demo's for 48×48 images, 6×6 codes of a codebook of 1024, on two CPU cores."""

from ml_collections import ConfigDict

from configs import demo_tokenizer


def get_config() -> ConfigDict:
    config = demo_tokenizer.get_config()
    config.model.update(resolution=48, codebook_size=1024)
    config.preprocess.resolution = 48
    config.data.update(source="configs/tasks_tokenizer_scenes.py", rgb_share=0.4, cache_gigabytes=1.0)
    config.loop.update(total_steps=4800, evaluate_every=1600)
    return config
