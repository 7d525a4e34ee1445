"""Base models, LoRA adapters and local fine-tuning. Knows torch, transformers and peft; nothing of codecs or Flower."""
