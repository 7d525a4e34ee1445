"""The learned codecs."""
