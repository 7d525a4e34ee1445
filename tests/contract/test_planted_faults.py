"""Codecs with one fault each: the rule that is about it finds it, and says what it found."""

from __future__ import annotations

import itertools
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, bfloats_of, bfloats_to_bytes, codec_id
from gradcodec.contract import RULES, Candidate, failure, failures, main
from gradcodec.errors import CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.registry import CodecEntry, register, unregister
from gradcodec.settings import CodecSettings


@dataclass(frozen=True)
class HalvesCodec(WithoutSideInformation):
    """Without a fault: bfloat16 of every value."""

    layout: Layout
    id: bytes = codec_id("halves/1")
    num_streams: int = 1

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (2 * layout.num_parameters,)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (bfloats_to_bytes(self.layout.flatten(blocks_RC.cpu())),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) != 2 * self.layout.num_parameters:
            raise CodecError(f"{len(codes[0])} bytes of {2 * self.layout.num_parameters}")
        return self.layout.unflatten(bfloats_of(codes[0]))


class LosesMass(HalvesCodec):
    """It says that all arrives, and leaves out every other column: nobody sends that mass again."""

    def encode_with_decoded(
        self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None
    ) -> tuple[Codes, Tensor]:
        kept_RC = blocks_RC.clone()
        kept_RC[:, ::2] = 0
        return self.encode(kept_RC, max_bytes, side), blocks_RC


class ExceedsItsBudget(HalvesCodec):
    """It has a rate, and takes what it wants."""


class TakesMoreThanPlanned(HalvesCodec):
    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (super().encode(blocks_RC, max_bytes, side)[0] + b"\0",)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        return super().decode((codes[0][:-1],), side)


class AddsEnergy(HalvesCodec):
    """It forgets to divide by three: the frame's gain would hide that."""

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        return 3 * super().decode(codes, side)


class AddsEnergyAtTheReceiver(AddsEnergy):
    """Its sender does not see it, so that no gain is sent."""

    def encode_with_decoded(
        self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None
    ) -> tuple[Codes, Tensor]:
        codes = self.encode(blocks_RC, max_bytes, side)
        return codes, HalvesCodec.decode(self, codes, side)


class DiesOnATruncatedPayload(HalvesCodec):
    """An error of the library that it reads with comes through."""

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        halves = struct.unpack(f"<{self.layout.num_parameters}H", codes[0])
        return self.layout.unflatten(bfloats_of(struct.pack(f"<{len(halves)}H", *halves)))


class BelievesEverySize(HalvesCodec):
    """Its first bytes say how much room is needed, and it takes that room."""

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (4 + 2 * layout.num_parameters,)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (struct.pack("<I", self.layout.num_parameters) + super().encode(blocks_RC, max_bytes, side)[0],)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) < 4:
            raise CodecError("it ends within its head")
        room = np.empty(struct.unpack_from("<I", codes[0])[0], np.uint8)
        return super().decode((codes[0][4:],), side) + 0 * room.size


class DiffersByDevice(HalvesCodec):
    """A sum of floats decides which values are turned over: another processor comes to another one."""

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        halves = bfloats_of(bfloats_to_bytes(self.layout.flatten(blocks_RC.cpu())))
        return super().encode(self.layout.unflatten(halves * self._signs(halves)), max_bytes, side)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        halves = self.layout.flatten(super().decode(codes, side))
        return self.layout.unflatten(halves * self._signs(halves))

    def _signs(self, values: Tensor) -> Tensor:
        seed = int(values.abs().sum().view(torch.int32))
        return torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class DrawsByTheProcess(HalvesCodec):
    """Python's hashes of texts are others in every process."""

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        weight = 1 - (hash("halves") % 1000) / 4000
        return super().encode(blocks_RC * weight, max_bytes, side)


class RemembersItsCalls(HalvesCodec):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return super().encode(blocks_RC * (1 - next(self.calls) % 7 / 1000), max_bytes, side)


class SendsNothing(HalvesCodec):
    """No rule of one payload is broken, and nothing ever arrives."""

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        return 0 * super().decode(codes, side)


class ChangesItsInput(HalvesCodec):
    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return super().encode(blocks_RC.mul_(0.5), max_bytes, side)


@dataclass(frozen=True)
class KeepsItsOptionsToItself(HalvesCodec):
    """Ends with other options would read each other's payloads."""

    kept: float = 0.5

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return super().encode(blocks_RC * min(self.kept, 1), max_bytes, side)

    @classmethod
    def stream_bytes(cls, layout: Layout, kept: float = 0.5) -> tuple[int, ...]:
        return super().stream_bytes(layout)


FAULTS = [
    (LosesMass, {}, "conservation", "this mass is lost"),
    (ExceedsItsBudget, {"has_rate": True}, "budget", "bytes of"),
    (TakesMoreThanPlanned, {}, "budget", "planned are"),
    (AddsEnergy, {}, "contraction", "its codes alone add energy"),
    (AddsEnergyAtTheReceiver, {}, "contraction", "of the target's energy"),
    (DiesOnATruncatedPayload, {}, "hostile", "cut off after 0 of .* decoding raises error: unpack requires"),
    (BelievesEverySize, {}, "hostile", "decoding takes .* bytes"),
    (DiffersByDevice, {}, "device", "rounds otherwise.* decodes to values"),
    (DrawsByTheProcess, {}, "determinism", "a fresh process gives other bytes"),
    (RemembersItsCalls, {}, "determinism", "a second call gives other bytes"),
    (SendsNothing, {}, "feedback", "bring nothing at all"),
    (ChangesItsInput, {}, "interface", "changes the blocks"),
    (KeepsItsOptionsToItself, {"options": {"kept": 0.5}}, "options", "would not notice"),
]


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[str]:
    codec, fields = request.param
    register(CodecEntry("planted", f"{__name__}:{codec.__name__}", **fields))
    yield "planted"
    unregister("planted")


@pytest.mark.parametrize(
    ("planted", "rule", "said"),
    [((codec, fields), rule, said) for codec, fields, rule, said in FAULTS],
    indirect=["planted"],
    ids=[fault[0].__name__ for fault in FAULTS],
)
def test_the_rule_about_a_fault_finds_it(planted: str, rule: str, said: str) -> None:
    found = failure(RULES[rule], Candidate(CodecSettings(planted)))
    assert found is not None
    assert re.search(said, found), found


@pytest.mark.parametrize("planted", [(HalvesCodec, {})], indirect=True)
def test_without_a_fault_nothing_is_found(planted: str) -> None:
    assert failures(planted) == {}


@pytest.mark.parametrize("planted", [(AddsEnergy, {})], indirect=True)
def test_the_program_ends_with_an_error(
    planted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["contract", planted])
    with pytest.raises(SystemExit, match="1"):
        main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(RULES)
    assert lines["contraction"] != "ok" == lines["conservation"]


@pytest.mark.parametrize("arguments", [["zip"], ["resnet"], ["sign", "--option", "rank=4"]])
def test_the_program_refuses_what_it_cannot_try(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["contract", *arguments])
    with pytest.raises(SystemExit, match=r"^error: (name='zip'|artifact=null|options\.rank)"):
        main()
