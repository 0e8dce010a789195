"""Stream codecs (annotation ↔ image) and derived streams."""
