"""What every codec promises, rule by rule, for ours and for anybody's: run before it meets a federation.

    interface     float32 blocks of the layout's shape from as many streams as it says; its input stays as it was
    conservation  what the receiver decodes and the residual together are the target
    contraction   what is decoded is no farther from the target than zero is, untrained without any gain
    budget        no payload is longer than it may be; one rate takes the bytes that are planned
    determinism   the same bytes at every call, from every instance, in a fresh process
    options       a codec with other options has another id
    hostile       any bytes decode, or raise CodecError, and take no more memory than the entry says
    device        what one machine encodes another one decodes to the same values, to rounding
    feedback      what payloads leave out of the same update, again and again, comes with later ones

A rule is a function of a ``Candidate``, which raises ``BrokenRuleError`` if the codec breaks it; what else a codec
raises breaks it as well. Run as a program it prints a line a rule. Knows codecs by their interface alone.

Shape suffixes: R rank, C columns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder, build_codec, codec_of, payload_bytes
from gradcodec.codec import Codec
from gradcodec.contract_cases import LEAST, SMALL, WIDE, Allocations, Machine, hostile_codes, machines, update_of
from gradcodec.errors import BudgetError, CodecError
from gradcodec.exchange import decode_blocks, digest_of, encode_update, max_payload_bytes
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.frame import Frame, pack, unpack
from gradcodec.layout import Layout
from gradcodec.registry import CodecEntry, codec_names, entry_of, options_of, register
from gradcodec.settings import CodecSettings, check_codec

BITS = (0.02, 0.1, 0.5, 1.0, 2.0, 8.0)
SERVED = 2.0
"""Bits a parameter from which on every codec with a rate finds a payload."""
ROUNDS = 12
LEFT_OUT = 0.75
"""Of the share of an update that its first payload leaves out, what the mean of ``ROUNDS`` leaves out at most."""
ROUNDING = 2.0**-14
"""Share of a block's largest value by which machines may differ: in deep networks roundings add up."""
SPARE_BYTES = 16 << 20
"""For tables and the like, beside what an entry says that decoding takes."""


class BrokenRuleError(Exception):
    """A codec breaks a rule; the message says by which input, and how."""


@dataclass(frozen=True)
class Candidate:
    """A codec under test: its name, options and, if it is trained, the folder of its artifact."""

    settings: CodecSettings

    @property
    def entry(self) -> CodecEntry:
        return entry_of(self.settings.name)

    def build(self, layout: Layout, device: str = "cpu") -> Codec:
        """For a layout of ours: an artifact that serves one layout alone is taken for one of this layout."""
        if not self.entry.needs_artifact or self.entry.any_layout:
            return build_codec(self.settings, layout, device)
        artifact = load_artifact(artifact_folder(self.settings), self.settings.name)
        own = {**artifact.settings.get("codec", {}), "layout": layout.id.hex()}
        artifact = replace(artifact, settings={**artifact.settings, "codec": own})
        return codec_of(artifact, layout, device, self.settings.options)

    @property
    def has_rate(self) -> bool:
        return self.entry.has_rate


Rule = Callable[[Candidate], None]


def interface(candidate: Candidate) -> None:
    """Float32 blocks of the layout's shape, from as many streams as it says; its input stays as it was."""
    for layout in (SMALL, WIDE):
        codec = candidate.build(layout)
        _expect(len(codec.id) == 4, f"its id has {len(codec.id)} bytes, not 4")
        _expect(codec.layout.id == layout.id, "its layout is not the one that it was built for")
        blocks_RC = layout.to_blocks(update_of(layout, 0))
        before_RC = blocks_RC.clone()
        codes = codec.encode(blocks_RC, _most_bytes(candidate, layout, SERVED), None)
        _expect(torch.equal(blocks_RC, before_RC), "encoding changes the blocks that it is given")
        _expect(
            len(codes) == codec.num_streams, f"its codes have {len(codes)} streams, num_streams={codec.num_streams}"
        )
        decoded_RC = codec.decode(codes, None)
        _expect(decoded_RC.dtype == torch.float32, f"it decodes to {decoded_RC.dtype}, not float32")
        shape = tuple(decoded_RC.shape)
        _expect(shape == tuple(blocks_RC.shape), f"it decodes to shape {shape}, not {tuple(blocks_RC.shape)}")


def conservation(candidate: Candidate) -> None:
    """What the receiver decodes and the sender's residual together are the target."""
    for sent in _transfers(candidate):
        rest_RC = sent.target_RC - sent.decoded_RC
        largest = float((rest_RC - sent.error_RC).abs().max())
        _expect(
            largest <= 1e-6 * float(sent.target_RC.abs().max()),
            f"{sent.what}: decoded and residual miss the target by {largest:.3g}, values of which are up to "
            f"{float(sent.target_RC.abs().max()):.3g}: this mass is lost",
        )


def contraction(candidate: Candidate) -> None:
    """What is decoded is no farther from the target than zero is."""
    for sent in _transfers(candidate):
        energy, error = inner_product(sent.target_RC, sent.target_RC), squared_distance(sent.target_RC, sent.decoded_RC)
        _expect(error <= energy * (1 + 1e-6), f"{sent.what}: the error has {error / energy:.4g} of the target's energy")
        _expect(
            sent.gain == 1 or candidate.entry.needs_artifact,
            f"{sent.what}: its codes alone add energy, so that the frame's gain is {sent.gain:.3g} (0: nothing counts)",
        )


def budget(candidate: Candidate) -> None:
    """No payload is longer than it may be, and one of the only rate takes what is planned."""
    for layout in (SMALL, WIDE, LEAST):
        codec, update = candidate.build(layout), update_of(layout, 1)
        if not candidate.has_rate:
            planned, found = payload_bytes(candidate.settings, layout), len(encode_update(update, None, codec=codec)[0])
            _expect(
                planned == found,
                f"a payload of {layout.num_parameters} parameters takes {found} bytes, planned are {planned}",
            )
        for bits in BITS if candidate.has_rate else ():
            most = max_payload_bytes(bits, layout.num_parameters)
            try:
                found = len(encode_update(update, None, codec=codec, max_bytes=most)[0])
            except BudgetError as error:
                _expect(bits < SERVED or layout is not WIDE, f"{bits} bits a parameter are refused: {error}")
                continue
            _expect(found <= most, f"a payload of {layout.num_parameters} parameters takes {found} bytes of {most}")


def determinism(candidate: Candidate, elsewhere: str | None = None) -> None:
    """The same bytes at every call, from every instance, and in a fresh process.

    Args:
        candidate: the codec.
        elsewhere: what a fresh process gives (``digests_elsewhere``); None: one is started.
    """
    codec, blocks_RC = candidate.build(WIDE), WIDE.to_blocks(update_of(WIDE, 2))
    first = codec.encode(blocks_RC, _most_bytes(candidate, WIDE, SERVED), None)
    _expect(
        first == codec.encode(blocks_RC, _most_bytes(candidate, WIDE, SERVED), None), "a second call gives other bytes"
    )
    here = digest_here(candidate)
    _expect(here == digest_here(candidate), "two instances give other bytes for the same updates")
    for found in digests_elsewhere([candidate]) if elsewhere is None else [elsewhere]:
        _expect(found in ("", here), "a fresh process gives other bytes for the same updates")


def options(candidate: Candidate) -> None:
    """Ends whose options differ have different ids; every rule of bytes holds for other options, too."""
    given = options_of(candidate.settings.name, candidate.settings.options)
    by_default = Candidate(replace(candidate.settings, options={}))
    _expect(
        given == candidate.entry.options or by_default.build(SMALL).id != candidate.build(SMALL).id,
        f"options={given} give the id of {dict(candidate.entry.options)}: ends that differ would not notice",
    )
    for key, value in given.items():
        for other in _others(value):
            changed = Candidate(replace(candidate.settings, options={**given, key: other}))
            try:
                check_codec(changed.settings)
                same = changed.build(SMALL).id == candidate.build(SMALL).id
            except CodecError:
                continue
            _expect(
                not same, f"options.{key}={other!r} gives the id of {key}={value!r}: ends that differ would not notice"
            )
            budget(changed)


def hostile(candidate: Candidate) -> None:
    """Any bytes decode, or raise CodecError, and take no more memory than the entry says."""
    codec = candidate.build(SMALL)
    honest = codec.encode(SMALL.to_blocks(update_of(SMALL, 3)), _most_bytes(candidate, SMALL, SERVED), None)
    with Allocations():
        _decode_hostile(codec, honest, "honest bytes")  # what is loaded and made once does not count
    most = 4 * candidate.entry.decoding_updates * SMALL.rank * SMALL.num_columns + SPARE_BYTES
    tracemalloc.start()
    try:
        with Allocations() as torchs:
            for what, codes in hostile_codes(honest):
                tracemalloc.reset_peak()
                before, torchs.largest = tracemalloc.get_traced_memory()[0], 0
                _decode_hostile(codec, codes, what)
                taken = max(tracemalloc.get_traced_memory()[1] - before, torchs.largest)
                _expect(taken <= most, f"{what}: decoding takes {taken:,} bytes, by its entry at most {most:,}")
    finally:
        tracemalloc.stop()


def device(candidate: Candidate) -> None:
    """What one machine encodes another one decodes to the same values, to rounding."""
    for machine in machines():
        for bits in (0.5, SERVED):
            _same_values(candidate, machine, bits)


def feedback(candidate: Candidate) -> None:
    """What payloads of the same update leave out, later ones bring."""
    codec, update = candidate.build(WIDE), update_of(WIDE, 4)
    blocks_RC, carried_RC = WIDE.to_blocks(update), None
    delivered_RC, side = torch.zeros_like(blocks_RC), codec.side_information(blocks_RC)
    most = _most_bytes(candidate, WIDE, SERVED)
    means = []
    for number in range(1, ROUNDS + 1):
        payload, residual = encode_update(update, carried_RC, codec=codec, max_bytes=most, side=side)
        delivered_RC += decode_blocks(payload, codec=codec, side=side)
        carried_RC = residual.carried(digest_of(payload), decay=1.0)
        means.append(delivered_RC / number)
    reached = delivered_RC != 0  # what a codec never sends of any update no later payload brings
    _expect(bool(reached.any()), f"{ROUNDS} payloads of an update bring nothing at all")
    energy = inner_product(blocks_RC[reached], blocks_RC[reached])
    first, last = (squared_distance(blocks_RC[reached], mean_RC[reached]) / energy for mean_RC in (means[0], means[-1]))
    _expect(
        last <= max(LEFT_OUT * first, 1e-6),
        f"the mean of {ROUNDS} payloads leaves out {last:.3g} of an update's energy, and the first one {first:.3g}",
    )


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (interface, conservation, contraction, budget, determinism, options, hostile, device, feedback)
}


def failure(rule: Rule, candidate: Candidate) -> str | None:
    """What a codec does against a rule; None: it keeps it."""
    try:
        rule(candidate)
    except BrokenRuleError as error:
        return str(error)
    except Exception as error:  # it is another's code, which may raise anything
        return f"it raises {type(error).__name__}: {error}"
    return None


def failures(name: str, options: dict[str, Any] | None = None, artifact: str | None = None) -> dict[str, str]:
    """The rules that a codec breaks, and how: none, if all is well."""
    candidate = Candidate(CodecSettings(name, artifact=artifact, options=options or {}))
    check_codec(candidate.settings)
    found = {rule_name: failure(rule, candidate) for rule_name, rule in RULES.items()}
    return {rule_name: said for rule_name, said in found.items() if said is not None}


# What is sent


@dataclass(frozen=True)
class _Sent:
    """One transfer: what was meant, what the sender keeps, what the receiver has."""

    what: str
    target_RC: Tensor
    error_RC: Tensor
    decoded_RC: Tensor
    gain: float


def _transfers(candidate: Candidate) -> Iterator[_Sent]:
    """Over layouts, sizes of values and budgets, with and without side information; the receiver has a codec of its
    own."""
    for layout, scale in ((SMALL, 1e-9), (WIDE, 1e-3), (SMALL, 1e4)):
        sender, receiver = candidate.build(layout), candidate.build(layout)
        update = update_of(layout, 5, scale)
        carried_RC = layout.to_blocks(update_of(layout, 6, 0.3 * scale))
        sides = [None, sender.side_information(layout.to_blocks(update_of(layout, 7, scale)))]
        for side in sides if sides[1] is not None else sides[:1]:
            for bits in (0.5, SERVED, None) if candidate.has_rate else (None,):
                most = None if bits is None else max_payload_bytes(bits, layout.num_parameters)
                what = f"{layout.num_parameters} parameters of about {scale:g}, {bits or 'all'} bits, " + (
                    "no side information" if side is None else "side information"
                )
                try:
                    payload, residual = encode_update(update, carried_RC, codec=sender, max_bytes=most, side=side)
                except BudgetError:
                    continue
                decoded_RC = decode_blocks(payload, codec=receiver, side=side)
                gain = unpack(payload, receiver.num_streams).gain
                yield _Sent(what, residual.target_RC, residual.error_RC, decoded_RC, gain)


def _most_bytes(candidate: Candidate, layout: Layout, bits: float) -> int | None:
    return max_payload_bytes(bits, layout.num_parameters) if candidate.has_rate else None


# Processes


def digest_here(candidate: Candidate) -> str:
    """Of payloads, made by an instance of its own."""
    codec, whole = candidate.build(WIDE), hashlib.sha256()
    side = codec.side_information(WIDE.to_blocks(update_of(WIDE, 8)))
    for seed in range(3):
        most = _most_bytes(candidate, WIDE, SERVED)
        whole.update(encode_update(update_of(WIDE, seed), None, codec=codec, max_bytes=most, side=side)[0])
    return whole.hexdigest()


def digests_elsewhere(candidates: Sequence[Candidate]) -> list[str]:
    """The same from one fresh process for all, with other hashes of texts; empty for codecs that are of this process
    alone. Raises BrokenRuleError: the process fails."""
    asked = [[_as_json(one.entry), vars(one.settings)] for one in candidates]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "12345"}
    program = "from gradcodec.contract import _answer; _answer()"
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(asked), env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BrokenRuleError(f"a fresh process fails: {done.stderr.strip().splitlines()[-1:]}")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _as_json(entry: CodecEntry) -> dict[str, Any]:
    fields = {**vars(entry), "options": dict(entry.options)}
    return {key: value if not callable(value) else _place_of(value) for key, value in fields.items()}


def _place_of(what: Any) -> str:
    """``module:name`` of a class or function, if another process finds it there; else the empty text."""
    module = None if what.__module__ == "__main__" else sys.modules.get(what.__module__)
    is_there = getattr(module, "__spec__", None) is not None and getattr(module, what.__name__, None) is what
    return f"{what.__module__}:{what.__name__}" if is_there else ""


def _answer() -> None:
    """In the fresh process."""
    digests = []
    for fields, settings in json.load(sys.stdin):
        if not fields["codec"]:
            digests.append("")
            continue
        if fields["name"] not in codec_names():
            register(CodecEntry(**{**fields, "trained_as": tuple(fields["trained_as"])}))
        digests.append(digest_here(Candidate(CodecSettings(**settings))))
    print(json.dumps(digests))


# Options


def _others(value: Any) -> list[Any]:
    """Values of the same type near an option's, one of which it may take."""
    if isinstance(value, bool):
        return [not value]
    return (
        [value + 1, value - 1, value * 2, value / 2]
        if isinstance(value, float)
        else [value + 1, value - 1]
        if isinstance(value, int)
        else []
    )


# Hostile bytes


def _decode_hostile(codec: Codec, codes: tuple[bytes, ...], what: str) -> None:
    try:
        decoded_RC = decode_blocks(pack(Frame(codec.id, codec.layout.id, 1.0, codes)), codec=codec)
    except CodecError:
        return
    except Exception as error:  # the rule is that there is no other
        raise BrokenRuleError(
            f"{what}: decoding raises {type(error).__name__}: {error}; CodecError is expected"
        ) from error
    shape = (codec.layout.rank, codec.layout.num_columns)
    _expect(tuple(decoded_RC.shape) == shape, f"{what}: it decodes to shape {tuple(decoded_RC.shape)}, not {shape}")


def _same_values(candidate: Candidate, machine: Machine, bits: float) -> None:
    """What is encoded here is decoded there as here, and what is encoded there is decoded here as its sender thinks."""
    here, most = candidate.build(WIDE), _most_bytes(candidate, WIDE, bits)
    side = here.side_information(WIDE.to_blocks(update_of(WIDE, 9)))
    update = update_of(WIDE, 10)
    payload, _ = encode_update(update, None, codec=here, max_bytes=most, side=side)
    decoded_RC = decode_blocks(payload, codec=here, side=side)
    with machine.computing():
        there = candidate.build(WIDE, machine.device)
        theirs_RC = decode_blocks(payload, codec=there, side=side).cpu()
        moved = {name: tensor.to(machine.device) for name, tensor in update.items()}
        back, residual = encode_update(moved, None, codec=there, max_bytes=most, side=side)
    _expect(here.id == there.id, f"{machine.name}: its id is another one there")
    _alike(decoded_RC, theirs_RC, f"{machine.name}, {bits} bits: a payload from here")
    meant_RC = (residual.target_RC - residual.error_RC).cpu()
    _alike(decode_blocks(back, codec=here, side=side), meant_RC, f"{machine.name}, {bits} bits: a payload from there")


def _alike(here_RC: Tensor, there_RC: Tensor, what: str) -> None:
    for block in WIDE.blocks:
        columns = slice(block.start, block.stop)
        largest = float(here_RC[:, columns].abs().max())
        apart = float((here_RC[:, columns] - there_RC[:, columns]).abs().max())
        _expect(
            apart <= ROUNDING * largest,
            f"{what} decodes to values up to {apart:.3g} apart in {block.name!r}, where the largest is {largest:.3g}",
        )


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenRuleError(otherwise)


# The program


def main() -> None:
    """Tries one codec, and says of each rule whether it keeps it."""
    parser = argparse.ArgumentParser(
        prog="gradcodec.contract", description="Tries a codec by the rules that every codec keeps."
    )
    parser.add_argument("name", help="of the codec, as it is registered or as a plug-in offers it")
    parser.add_argument("--artifact", help="folder of the trained codec, for those that are trained")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="one of its own settings")
    args = parser.parse_args()
    given = dict(text.partition("=")[::2] for text in args.option)
    try:
        candidate = Candidate(
            CodecSettings(args.name, artifact=args.artifact, options={k: _read(v) for k, v in given.items()})
        )
        check_codec(candidate.settings)
    except CodecError as error:
        sys.exit(f"error: {error}")
    broken = False
    for name, rule in RULES.items():
        said = failure(rule, candidate)
        broken |= said is not None
        print(f"{name:<14}{'ok' if said is None else said}", flush=True)
    sys.exit(int(broken))


def _read(text: str) -> Any:
    """A number, true or false, or the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) and math.isfinite(value) else text


if __name__ == "__main__":
    main()
