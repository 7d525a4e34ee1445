"""Base models, LoRA adapters and local fine-tuning. Knows torch, transformers and peft; nothing of codecs or Flower."""

import logging

from transformers.utils.logging import disable_progress_bar

# At import it warns of optional CPU kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
disable_progress_bar()  # a bar for every load would run over the rounds' own
