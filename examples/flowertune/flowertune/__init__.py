"""Federated LoRA fine-tuning of a language model on instructions."""
