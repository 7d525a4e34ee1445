"""What the model writes before the run and after it: greedy continuations of a little held-out text.

For a person who wants to see what a loss means. Nothing is drawn at random, so the same run gives the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from adapters.model import set_adapter
from adapters.windows import Windows
from server.run.evaluate import Evaluator

MOST_TOKENS = 40
"""Of a continuation."""
PROMPT_TOKENS = 24
"""Of a text in which every token counts; where only answers count, the prompt is all that stands before one."""
PROMPT, TRUE = "prompt", "how it really goes on"


def sample_answers(
    evaluator: Evaluator, adapters: Mapping[str, Mapping[str, Tensor]], count: int
) -> list[dict[str, str]]:
    """One row a prompt: the prompt, how the model goes on with each adapter, and how the text itself does.

    Args:
        evaluator: whose model and held-out windows are used; the last of the adapters stays in the model.
        adapters: what each is called -> its tensors.
        count: of prompts, taken evenly from all held-out windows.
    """
    windows = _chosen(evaluator.heldout, count)
    if not len(windows):
        return []
    model, tokenizer = evaluator.model, evaluator.tokenizer
    assert tokenizer is not None, "an evaluator has one"
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pairs = [_split(windows[i : i + 1].trimmed(), room) for i in range(len(windows))]
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    rows = [{PROMPT: text(prompt)} for prompt, _ in pairs]
    for name, adapter in adapters.items():
        set_adapter(model, adapter)
        for row, told in zip(rows, _continued(model, [prompt for prompt, _ in pairs], pad), strict=True):
            row[name] = text(told)
    for row, (_, true) in zip(rows, pairs, strict=True):
        row[TRUE] = text(true)
    return rows


def _chosen(windows: Windows, count: int) -> Windows:
    count = min(count, len(windows))
    return windows[torch.tensor([number * len(windows) // count for number in range(count)], dtype=torch.int64)]


def _split(window: Windows, room: int | None) -> tuple[Tensor, Tensor]:
    """The tokens of a prompt, and those that follow it, of one window.

    Args:
        room: tokens that the model takes; None: any number.
    """
    ids, counted = window.ids[0], window.counted[0]
    answers = counted.nonzero().flatten()
    first = int(answers[0]) if len(answers) else 0
    if bool(counted.all()) or first == 0:
        first = max(1, min(PROMPT_TOKENS, len(ids) // 2))
    prompt = ids[:first]
    if room is not None:
        prompt = prompt[-max(1, room - MOST_TOKENS) :]
    return prompt, ids[first : first + MOST_TOKENS]


@torch.no_grad()
def _continued(model: PeftModel, prompts: Sequence[Tensor], pad: int) -> Tensor:
    """The tokens that follow each of the prompts, ``[prompts, at most MOST_TOKENS]``."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded at their start, since at their end they go on
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        told: Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=pad,
        )
    return told[:, length:].cpu()
