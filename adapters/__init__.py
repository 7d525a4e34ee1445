"""Base models, LoRA adapters and local fine-tuning. Knows torch, transformers and peft; nothing of codecs or Flower."""

import logging

from transformers.utils.logging import disable_progress_bar

# At import it warns of optional CPU kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of every retry; what came of them is in the error
# Its table of weights that do not fit is one line in the error. Not by level: a higher one makes transformers say more.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
disable_progress_bar()  # a bar for every load would run over the rounds' own
