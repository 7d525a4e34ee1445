"""The way down: steps that every machine decodes to the same bits; clients that come to hold what the server holds."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, heavy_tailed_update
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import save
from torch import Tensor

from client.holdings import load_held, save_held
from gradcodec.broadcast import (
    Bundle,
    Held,
    catch_up,
    decode_step,
    encode_step,
    pack_bundle,
    pack_snapshot,
    unpack_bundle,
    unpack_snapshot,
)
from gradcodec.build import build_codec
from gradcodec.client import LacksError, take_in
from gradcodec.codec import Codec
from gradcodec.delivery import Delivery
from gradcodec.errors import CodecError, DivergedError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.settings import CodecSettings
from gradcodec.transfers import broadcast_context

CODECS = ("learned", "rotated", "topk", "eden", "projection", "sign", "nf4", "identity")
BITS = 1.0


class AnotherMachine:
    """The same codec where sums are added up in another order: decoded values differ in their last bits."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.id, self.layout, self.num_streams = codec.id, codec.layout, codec.num_streams
        self._generator = torch.Generator().manual_seed(5)

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        side = self._codec.side_information(global_update_RC)
        return None if side is None else side * (1 + 2.0**-22)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        raise AssertionError("it only listens")

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        decoded_RC = self._codec.decode(codes, side)
        noise_RC = torch.rand(decoded_RC.shape, generator=self._generator) * 2 - 1
        for block in self.layout.blocks:
            columns = slice(block.start, block.stop)
            noise_RC[:, columns] *= decoded_RC[:, columns].abs().max() * 2.0**-22
        return decoded_RC + noise_RC


def codec_named(name: str, layout: Layout, learned: LearnedCodec) -> Codec:
    return learned if name == "learned" else build_codec(CodecSettings(name=name), layout)


def step_of(layout: Layout, number: int) -> Tensor:
    return layout.to_blocks(heavy_tailed_update(number))


def start_of(layout: Layout) -> Held:
    return Held.at_start(layout.to_blocks(heavy_tailed_update(1000)))


@pytest.mark.parametrize("name", CODECS)
def test_every_machine_comes_to_the_same_bits(name: str, layout: Layout, learned: LearnedCodec) -> None:
    codec = codec_named(name, layout, learned)
    budget, carried_RC = int(BITS * layout.num_parameters / 8), None
    here = there = start_of(layout)
    for number in range(20):
        step_RC = step_of(layout, number)
        data, after, residual = encode_step(
            step_RC, carried_RC, held=here, codec=codec, max_bytes=budget, context=b"run"
        )
        target_RC = step_RC if carried_RC is None else step_RC + carried_RC
        assert torch.allclose(residual.error_RC + (after.moved_RC - here.moved_RC), target_RC, atol=1e-9)
        assert len(data) <= budget or name in ("sign", "nf4", "identity")
        there = decode_step(data, held=there, codec=AnotherMachine(codec), context=b"run")
        assert torch.equal(there.moved_RC, after.moved_RC)
        assert there.digest == after.digest
        here, carried_RC = after, residual.error_RC
    assert here.moved_RC.abs().max() > 0


def test_values_between_two_points_are_named(layout: Layout, learned: LearnedCodec) -> None:
    """Without their names the other machine would take some of them for the other point."""
    codec = codec_named("learned", layout, learned)
    named = 0
    for number in range(60):
        data, _, _ = encode_step(step_of(layout, number), None, held=start_of(layout), codec=codec, max_bytes=None)
        named += data[2]  # a count below 128
    assert named > 0


@pytest.mark.parametrize("name", CODECS)
def test_a_snapshot_is_what_was_held(name: str, layout: Layout, learned: LearnedCodec) -> None:
    codec, held = codec_named(name, layout, learned), start_of(layout)
    assert (
        unpack_snapshot(pack_snapshot(held, layout, True), layout, torch.zeros_like(held.start_RC)).digest
        == held.digest
    )
    for number in range(6):
        held = encode_step(step_of(layout, number), None, held=held, codec=codec, max_bytes=240)[1]
    data = pack_snapshot(held, layout, False)
    assert len(data) < 4 * layout.num_parameters + 400
    assert unpack_snapshot(data, layout, held.start_RC).digest == held.digest


def test_a_snapshot_of_anything_is_exact(layout: Layout) -> None:
    wide_RC = layout.unflatten(
        torch.randn(layout.num_parameters) * 10.0 ** torch.randint(-20, 20, (layout.num_parameters,))
    )
    held = Held(start_of(layout).start_RC, wide_RC)
    assert unpack_snapshot(pack_snapshot(held, layout, False), layout, held.start_RC).digest == held.digest


def test_a_step_counts_on_its_own_state_alone(layout: Layout, learned: LearnedCodec) -> None:
    held = start_of(layout)
    first, after, _ = encode_step(step_of(layout, 0), None, held=held, codec=learned, max_bytes=240, context=b"run")
    with pytest.raises(CodecError, match="another context"):
        decode_step(first, held=after, codec=learned, context=b"run")
    with pytest.raises(CodecError, match="another context"):
        decode_step(first, held=held, codec=learned, context=b"another run")


def test_what_is_no_broadcast_is_refused(layout: Layout, learned: LearnedCodec) -> None:
    """Every cut and thousands of changes: a CodecError, or a state (of a changed grid or name) and nothing else."""
    held = start_of(layout)
    step, after, _ = encode_step(step_of(layout, 0), None, held=held, codec=learned, max_bytes=240)
    bundle = pack_bundle(pack_snapshot(after, layout, True), [step])
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    refused = 0
    for number in range(3000):
        data = bytearray(bundle)
        for _ in range(1 + draw(3)):
            data[draw(len(data))] = draw(256)
        cut = bytes(data[: draw(len(data) + 1)] if number % 2 else data)
        try:
            catch_up(held, unpack_bundle(cut), layout=layout, codec_at=lambda _: learned)
        except CodecError:
            refused += 1
    assert refused > 2000


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_bytes_of_anybody_are_refused(data: bytes) -> None:
    layout = Layout.of(SHAPES)
    with pytest.raises(CodecError):
        unpack_snapshot(data, layout, torch.zeros(layout.rank, layout.num_columns))
    try:
        bundle = unpack_bundle(data)
    except CodecError:
        return
    assert pack_bundle(bundle.snapshot, bundle.steps) == data or b"\x80" in data  # a varint may be padded


def test_a_bomb_is_not_inflated(layout: Layout) -> None:
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 26), 9)), dtype=torch.uint8)
    data = save({"moved": bomb, "grid": torch.tensor([0], dtype=torch.int16)})
    with pytest.raises(CodecError, match="cannot be read"):
        unpack_snapshot(data, layout, torch.zeros(layout.rank, layout.num_columns))


LAYOUT = Layout.of(SHAPES)
START = heavy_tailed_update(1000)
RUN = "run"
CLIENTS = 4


class Protocol(RuleBasedStateMachine):
    """Clients that come and go, lose and damage what they hold, and a server that begins again from a checkpoint: who
    answers holds the server's adapter to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.codec = build_codec(CodecSettings(name="rotated"), LAYOUT)
        self.adapter: Mapping[str, Tensor] = START
        self.seed = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def new_server(self) -> Delivery:
        return Delivery(
            lambda _: self.codec, LAYOUT, START, RUN, 240, range(CLIENTS), start_is_known=self.start_is_known
        )

    @initialize(start_is_known=st.booleans(), rehearsed=st.booleans())
    def begin(self, start_is_known: bool, rehearsed: bool) -> None:
        self.start_is_known = start_is_known
        self.server = self.new_server()
        if rehearsed:
            self.server.foresee(self.codec.side_information(LAYOUT.to_blocks(heavy_tailed_update(7))))
        self.checkpoint = self.server.state(), dict(self.adapter)

    def keys(self) -> set[str]:
        return {name for name in self.server.state().tensors if name.startswith("key/")}

    def client(self, partition: int) -> None:
        """One client in a round: in at most two messages it holds what the server holds."""
        parcel = self.server.outgoing(partition)
        for repaired in (False, True):
            broadcast = parcel.broadcast
            sizes = parcel.step_bytes + parcel.catch_up_bytes + parcel.snapshot_bytes
            assert sizes == len(broadcast.bundle)
            own = heavy_tailed_update(1000 if self.start_is_known else 1001)  # of another seed
            before = load_held(self.folder, partition, LAYOUT, LAYOUT.to_blocks(own))
            try:
                held = take_in(broadcast, before, LAYOUT, lambda _: self.codec, broadcast_context(RUN))
            except LacksError as error:
                assert not repaired, "one repair is enough"
                parcel = self.server.repair(partition, error.holds)
                continue
            break
        save_held(self.folder, partition, held)
        for name, tensor in LAYOUT.to_update(held.adapter_RC).items():
            assert torch.equal(tensor, self.adapter[name])

    @rule(asked=st.sets(st.integers(0, CLIENTS - 1), min_size=1), silent=st.sets(st.integers(0, CLIENTS - 1)))
    def round(self, asked: set[int], silent: set[int]) -> None:
        """``silent`` ones take in what they are sent, and then nothing is heard of them."""
        for partition in sorted(asked):
            self.client(partition)
        for partition in asked - silent:
            self.server.answered(partition)
        self.seed += 1
        step = heavy_tailed_update(self.seed)
        new = {name: tensor + step[name] for name, tensor in self.adapter.items()}
        keys = self.keys()
        adapter, settled = self.server.settle(new)
        if self.keys() == keys:
            for name, tensor in settled.items():
                assert torch.allclose(self.adapter[name] + tensor, adapter[name], atol=1e-7)
        axes, side = self.codec.side_information(LAYOUT.to_blocks(settled)), self.server.held.side
        assert axes is not None
        assert side is not None
        assert torch.allclose(axes, side, atol=1e-3)
        self.adapter = adapter

    @rule()
    def save(self) -> None:
        self.checkpoint = self.server.state(), dict(self.adapter)

    @rule(another=st.booleans())
    def begin_again(self, another: bool) -> None:
        """From the checkpoint, and then the next round comes out as before or (``another``) not."""
        state, self.adapter = self.checkpoint
        self.server = self.new_server()
        self.server.load_state(state)
        self.seed += 100 * another

    @rule(partition=st.integers(0, CLIENTS - 1))
    def lose(self, partition: int) -> None:
        for path in self.folder.glob(f"partition-{partition}.*"):
            path.unlink()

    @rule(partition=st.integers(0, CLIENTS - 1), place=st.floats(0, 0.999))
    def damage(self, partition: int, place: float) -> None:
        for path in self.folder.glob(f"partition-{partition}.*"):
            data = bytearray(path.read_bytes())
            data[int(place * len(data))] ^= 0x10
            path.write_bytes(data)

    @rule(one=st.integers(0, CLIENTS - 1), other=st.integers(0, CLIENTS - 1))
    def take_anothers(self, one: int, other: int) -> None:
        """A disk that comes back from a backup, or from another node."""
        for path in self.folder.glob(f"partition-{one}.*") if one != other else ():
            shutil.copyfile(path, self.folder / path.name.replace(f"-{one}.", f"-{other}."))

    @invariant()
    def nothing_half_written(self) -> None:
        assert not list(self.folder.glob("*.part*"))


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


def test_a_long_absence_costs_a_snapshot_at_most(layout: Layout, learned: LearnedCodec) -> None:
    """Of one client; that of all others would be worth a key."""
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(20))
    adapter: Mapping[str, Tensor] = START
    sizes = []
    for number in range(60):
        for partition in range(1, 20):
            server.answered(partition)
        step = heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
        sizes.append(server.missing_bytes(0))
    assert sizes[3] > sizes[2] > sizes[1]
    assert max(sizes) < 4 * layout.num_parameters
    assert sum(tensor.numel() for key, tensor in server.state().tensors.items() if key.startswith("step/")) <= (
        4 * layout.num_parameters
    )


def client_of(server: Delivery, partition: int, held: Held, codec: Codec) -> tuple[Held, int]:
    """What a client holds after one message, and the bytes of it; the server hears of it."""
    broadcast = server.outgoing(partition).broadcast
    after = take_in(broadcast, held, server.layout, lambda _: codec, broadcast_context(RUN))
    server.answered(partition)
    return after, len(broadcast.bundle)


def test_where_clients_rarely_come_a_key_stands_for_all_that_they_missed(layout: Layout, learned: LearnedCodec) -> None:
    """Of twenty clients one comes a round, and one of them has been away since the start."""
    num_clients = 20
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(num_clients))
    adapter: Mapping[str, Tensor] = START
    first = Held.at_start(layout.to_blocks(START))
    clients = dict.fromkeys(range(num_clients), first)
    wanted_RC, sizes = torch.zeros_like(first.moved_RC), []
    direction = heavy_tailed_update(5)
    for number in range(40):
        partition = number % (num_clients - 1)
        clients[partition], size = client_of(server, partition, clients[partition], learned)
        sizes.append(size)
        assert torch.equal(clients[partition].moved_RC, server.held.moved_RC)
        if number == 30:  # it goes on from a checkpoint as if nothing had been
            again = Delivery(lambda _: learned, layout, START, RUN, 240, range(num_clients))
            again.load_state(server.state())
            assert again.missing_bytes(num_clients - 1) == server.missing_bytes(num_clients - 1)
            server = again
        noise = heavy_tailed_update(100 + number)
        new = {name: tensor + direction[name] + 0.3 * noise[name] for name, tensor in adapter.items()}
        wanted_RC += layout.to_blocks(new) - layout.to_blocks(adapter)
        adapter, _ = server.settle(new)
    away, size = client_of(server, num_clients - 1, first, learned)
    assert away.digest == server.held.digest
    snapshot, steps = len(pack_snapshot(server.held, layout, False)), 40 * 240
    assert size < snapshot / 2
    assert size < steps / 4
    assert max(sizes) < snapshot / 2
    error = float((server.held.moved_RC - wanted_RC).square().sum() / wanted_RC.square().sum())
    assert error < 0.05, "a key leaves out about one step, and the next one makes up for it"


class AnotherPoint(AnotherMachine):
    """A machine that rounds one value to another point of the grid."""

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        decoded_RC = self._codec.decode(codes, side).clone()
        decoded_RC[0, 0] += decoded_RC.abs().max()
        return decoded_RC


@pytest.mark.parametrize("start_is_known", [True, False])
@pytest.mark.parametrize("rehearsed", [True, False])
@pytest.mark.parametrize("first_answer", [None, 1])
def test_who_cannot_take_in_a_key_is_sent_a_snapshot(
    start_is_known: bool, rehearsed: bool, first_answer: int | None, layout: Layout, learned: LearnedCodec
) -> None:
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(20), start_is_known=start_is_known)
    if rehearsed:
        server.foresee(learned.side_information(step_of(layout, 7)))
    adapter: Mapping[str, Tensor] = START
    held = start_of(layout) if start_is_known else Held.at_start(step_of(layout, 1001))
    for number in range(12):
        if number == first_answer:
            held, _ = client_of(server, 0, held, learned)
        step = heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
    wrong = AnotherPoint(learned)
    parcel = server.outgoing(0)
    assert parcel.snapshot_bytes > 240, "a key"
    with pytest.raises(LacksError) as lacks:
        take_in(parcel.broadcast, held, layout, lambda _: wrong, broadcast_context(RUN))
    repair = server.repair(0, lacks.value.holds).broadcast
    after = take_in(repair, held, layout, lambda _: wrong, broadcast_context(RUN))
    assert after.digest == server.held.digest


@pytest.mark.parametrize("name", ["sign", "projection", "identity", "nf4", "rotated"])
def test_keys_set_nobody_back(name: str, layout: Layout, learned: LearnedCodec) -> None:
    """Where a codec's error is a share of what it codes there are none."""
    codec = codec_named(name, layout, learned)
    without_keys = Delivery(lambda _: codec, layout, START, RUN, None if name != "rotated" else 240, range(1))
    with_keys = Delivery(lambda _: codec, layout, START, RUN, without_keys.max_bytes, range(20))
    left_out = []
    for server in (without_keys, with_keys):
        adapter: Mapping[str, Tensor] = START
        wanted_RC = torch.zeros(layout.rank, layout.num_columns)
        for number in range(16):
            server.answered(0)
            step = heavy_tailed_update(5)
            noise = heavy_tailed_update(100 + number)
            new = {key: tensor + step[key] + 0.3 * noise[key] for key, tensor in adapter.items()}
            wanted_RC += layout.to_blocks(new) - layout.to_blocks(adapter)
            adapter, _ = server.settle(new)
        left_out.append(float((server.held.moved_RC - wanted_RC).norm() / wanted_RC.norm()))
    without, keyed = left_out
    assert keyed < 1.5 * without + 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize("rounds_before", [0, 1, 5])
def test_a_step_that_is_no_number_diverges_and_changes_nothing(
    value: float, rounds_before: int, layout: Layout, learned: LearnedCodec
) -> None:
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(20))
    adapter: Mapping[str, Tensor] = START
    for number in range(rounds_before):
        step = heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
    before = server.held.digest
    wild = {name: torch.full_like(tensor, value) for name, tensor in adapter.items()}
    with pytest.raises(DivergedError):
        server.settle(wild)
    assert server.held.digest == before
    assert server.missing_bytes(0) == server.missing_bytes(1)


def test_what_many_clients_need_is_packed_once(layout: Layout, learned: LearnedCodec) -> None:
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(30))
    adapter: Mapping[str, Tensor] = START
    for number in range(20):
        server.answered(number)
        step = heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
    away = {id(server.outgoing(partition).broadcast.bundle) for partition in range(15)}
    assert len(away) == 1


def test_where_clients_come_all_the_time_there_is_no_key(layout: Layout, learned: LearnedCodec) -> None:
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(2))
    adapter: Mapping[str, Tensor] = START
    held = Held.at_start(layout.to_blocks(START))
    sizes = []
    for number in range(12):
        for partition in range(2):
            after, size = client_of(server, partition, held, learned)
            sizes.append(size)
        held, step = after, heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
    assert max(sizes) < 256


def test_a_step_that_a_client_cannot_take_in_is_not_sent_again(layout: Layout, learned: LearnedCodec) -> None:
    """It holds what the steps start from, and says so: what it is sent next has none."""
    server = Delivery(lambda _: learned, layout, START, RUN, 240, range(1))
    adapter: Mapping[str, Tensor] = START
    for number in range(2):
        step = heavy_tailed_update(number)
        adapter, _ = server.settle({name: tensor + step[name] for name, tensor in adapter.items()})
    first = server.outgoing(0)
    assert first.snapshot_bytes == 0
    second = server.repair(0, first.broadcast.held_before)
    assert second.snapshot_bytes > 0
    assert not unpack_bundle(second.broadcast.bundle).steps
    held = take_in(second.broadcast, start_of(layout), layout, lambda _: learned, b"")
    assert held.digest == server.held.digest


def test_a_snapshot_of_wild_numbers_is_refused(layout: Layout) -> None:
    moved = torch.frombuffer(bytearray(zlib.compress(bytes(4 * layout.num_parameters))), dtype=torch.uint8)
    wild = save({"moved": moved, "grid": torch.tensor([float("inf")])})
    head = b'{"moved":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
    for data in (wild, len(head).to_bytes(8, "little") + head):
        with pytest.raises(CodecError, match="cannot be read"):
            unpack_snapshot(data, layout, torch.zeros(layout.rank, layout.num_columns))


def test_bundle_of_nothing() -> None:
    assert unpack_bundle(pack_bundle(b"", [])) == Bundle(b"", ())


TINY = Layout.of({"x.lora_A.weight": (2, 3), "x.lora_B.weight": (4, 2)})
GOLDEN_STEP = (
    "f3ff00c6011b6cc80f74938dc9003c8ceac4df0000403b000080ba00000000000000000000a03b000000bb0000003b"
    "00000000000000000000803a00000000000000000000803a000080bb"
)
GOLDEN_SNAPSHOT = (
    "f0000000000000007b227374617274223a7b226474797065223a22463332222c227368617065223a5b31345d2c22646174615f6f66667365"
    "7473223a5b302c35365d7d2c2267726964223a7b226474797065223a22493136222c227368617065223a5b315d2c22646174615f6f666673"
    "657473223a5b35362c35385d7d2c2273696465223a7b226474797065223a224938222c227368617065223a5b322c322c325d2c2264617461"
    "5f6f666673657473223a5b35382c36365d7d2c226d6f766564223a7b226474797065223a225538222c227368617065223a5b32335d2c2264"
    "6174615f6f666673657473223a5b36362c38395d7d7d2020000000000000003e0000803e0000603f0000803f0000903f0000c03e0000003f"
    "0000203f0000403f0000a03f0000b03f0000c03f0000d03ff6ff7f00007f7f00007f78da63636460e0626661606002227606a20100070b00"
    "24"
)


def test_golden_bytes_of_a_step_and_a_snapshot() -> None:
    """On a grid of 2^-13, no value named; the snapshot's deflated points may be packed in other ways, and mean this."""
    codec = build_codec(CodecSettings(name="identity"), TINY)
    held = Held.at_start(torch.arange(14, dtype=torch.float32).reshape(2, 7) / 8)
    step_RC = torch.tensor([[3.0, -1, 0, 2, 0, 0, 1], [0, 5, -2, 0, 0, 1, -4]]) * 2.0**-10
    data, after, _ = encode_step(step_RC, None, held=held, codec=codec, max_bytes=None, context=b"run")
    assert data.hex() == GOLDEN_STEP
    assert (held.digest, after.digest) == ("b487166c35c7dafb", "3a7a8b641df3a3ef")
    assert torch.equal(decode_step(data, held=held, codec=codec, context=b"run").moved_RC, step_RC)
    whole = unpack_snapshot(bytes.fromhex(GOLDEN_SNAPSHOT), TINY, torch.zeros(2, 7))
    assert torch.equal(whole.start_RC, held.start_RC)
    assert torch.equal(whole.moved_RC, step_RC)
    assert whole.side is not None
    assert torch.equal(whole.side, torch.eye(2).repeat(2, 1, 1))
    deflated = pack_snapshot(whole, TINY, True)
    assert unpack_snapshot(deflated, TINY, torch.zeros(2, 7)).digest == whole.digest
    assert pack_bundle(b"", [data]).hex() == "00014b" + GOLDEN_STEP
