"""Recorded updates, codecs trained on them, and how near any codec comes to those that it was not trained on."""
