"""Images before tokenization: sources, preprocessing, augmentation and batches."""
