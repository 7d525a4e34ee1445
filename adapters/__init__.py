"""Base models, LoRA adapters and local fine-tuning. Knows torch, transformers and peft; nothing of codecs or Flower.

Importing the package alone loads none of them: ``adapters.settings`` serves programs that only check settings.
"""

import logging

# At import it warns of optional CPU kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of every retry; what came of them is in the error
# Its table of weights that do not fit is one line in the error. Not by level: a higher one makes transformers say more.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
