"""What single clients send less of than the run's settings say: fewer bits a parameter, an adapter of a lower rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conf.schema import Settings
from gradcodec.registry import entry_of
from strategies.settings import OF_THE_MEAN


@dataclass(frozen=True)
class ClientLimits:
    """One client's."""

    bits: float | None = None  # a parameter, of a payload; None: as many as the run says
    rank: int | None = None  # of every factor it trains the first so many rows; None: all


def limits_of(settings: Settings, partition: int, own: ClientLimits = ClientLimits()) -> ClientLimits:
    """The lower ones of what the run gives a partition and of what the node's owner gives."""
    federation = settings.federation
    bits = _least([settings.codec.bits, own.bits, _entry(federation.client_bits, partition)])
    rank = _least([own.rank, _entry(federation.client_ranks, partition)])
    return ClientLimits(None if bits == settings.codec.bits else bits, None if rank is None else int(rank))


def refusal_of(settings: Settings, limits: ClientLimits) -> str:
    """Why the run cannot have a client with these limits; empty: it can."""
    bits, secure = settings.codec.bits, settings.privacy.secure_aggregation
    if limits.bits is not None and not (settings.arm == "coded" and bits is not None and bits <= limits.bits):
        if settings.arm != "coded":
            return "sends adapters as they are: it needs arm=coded"
        if secure:
            return f"makes masked sums, in which all clients have one rate: give codec.bits={limits.bits:g}"
        if not entry_of(settings.codec.name).has_rate:
            return f"has codec={settings.codec.name}, which has one rate alone"
    if limits.rank is not None and limits.rank < highest_rank(settings):
        if secure:
            return f"makes masked sums, which do not tell who trained which rows: give lora.rank={limits.rank}"
        if settings.strategy.name not in OF_THE_MEAN:
            return (
                f"has strategy={settings.strategy.name}, which compares whole updates: choose one of "
                f"{', '.join(OF_THE_MEAN)}"
            )
    return ""


def check_limits(settings: Settings) -> None:
    """Raises ValueError: ``federation.client_bits`` or ``federation.client_ranks`` cannot be served."""
    federation = settings.federation
    for key, most in (("client_bits", math.inf), ("client_ranks", highest_rank(settings))):
        values: Sequence[float] = getattr(federation, key)
        for value in values:
            if not (0 < value <= most and math.isfinite(value)):
                upper = f" and at most {most}, the highest rank of the adapter" if math.isfinite(most) else ""
                raise ValueError(f"federation.{key} holds {value:g}: each must be greater than 0{upper}")
        if values and settings.arm not in ("dense", "coded"):
            raise ValueError(f"federation.{key} needs arm=dense or arm=coded: arm={settings.arm} asks no clients")
    for bits in federation.client_bits:
        if reason := refusal_of(settings, ClientLimits(bits=bits)):
            raise ValueError(f"federation.client_bits={federation.client_bits}: the run {reason}")
    for rank in federation.client_ranks:
        if reason := refusal_of(settings, ClientLimits(rank=rank)):
            raise ValueError(f"federation.client_ranks={federation.client_ranks}: the run {reason}")


def highest_rank(settings: Settings) -> int:
    """Of the adapter's factors."""
    return max(settings.lora.rank, *settings.lora.rank_pattern.values(), 0)


def _entry(values: Sequence[float], partition: int) -> float | None:
    """Dealt in turn: with two entries, partitions 0, 2, 4 have the first."""
    return values[partition % len(values)] if values else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
