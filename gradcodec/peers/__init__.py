"""Hand-made codecs that the learned one is measured against, each at equal bytes and with the same error feedback."""
