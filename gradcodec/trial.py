"""A budget is tried before any work: a run should not end in its first round since no payload is that small."""

from __future__ import annotations

import torch

from gradcodec.broadcast import Held, encode_step
from gradcodec.build import broadcast_budget, byte_budget
from gradcodec.codec import Codec
from gradcodec.errors import BudgetError
from gradcodec.exchange import encode_update
from gradcodec.settings import CodecSettings


def check_budgets(settings: CodecSettings, codec: Codec, device: torch.device | str = "cpu") -> None:
    """Encodes an update of noise both ways.

    Raises:
        BudgetError: no payload, or no broadcast, of so few bytes can be made; begins with the key, as ``bits=...``.
    """
    layout = codec.layout
    trial_N = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(0))
    trial_RC = layout.unflatten(trial_N).to(device)
    key, bits = "bits", settings.bits
    try:
        if (budget := byte_budget(settings, layout)) is not None:
            encode_update(layout.to_update(trial_RC), None, codec=codec, max_bytes=budget)
        key, bits = "down_bits", settings.down_bits
        if (budget := broadcast_budget(settings, layout)) is not None:
            held = Held.at_start(torch.zeros(layout.rank, layout.num_columns))
            encode_step(trial_RC, None, held=held, codec=codec, max_bytes=budget)
    except BudgetError as error:
        raise BudgetError(f"{key}={bits:g} of {layout.num_parameters:,} parameters: {error}") from None
