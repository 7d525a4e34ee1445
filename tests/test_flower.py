"""``gradcodec.flower``: an app of plain Flower, coded in three lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy

from gradcodec.errors import BudgetError, CodecError
from gradcodec.flower import Coded, CodedFedAvg, coded
from gradcodec.flower.arrays import AppArrays, Spec
from gradcodec.flower.turn import CODING, EXACT, LACKS, Turn
from gradcodec.flower.wire import PAYLOAD, PAYLOAD_TYPE, in_one_array
from gradcodec.registry import names_for_any_layout

WIDTH, RANK, CLIENTS, ROUNDS = 96, 4, 3, 8


def initial() -> ArrayRecord:
    """LoRA factors, a head, a bias, a norm with its statistics, and a counter."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "q.lora_A.weight": rng.normal(0, 0.1, (RANK, WIDTH)),
        "q.lora_B.weight": np.zeros((WIDTH, RANK)),
        "head.weight": rng.normal(0, 0.1, (40, 48)),
        "head.bias": np.zeros(40),
        "conv.weight": rng.normal(0, 0.1, (8, 3, 3, 3)),
        "norm.running_var": np.ones(40),
    }
    record = {name: Array(array.astype(np.float32)) for name, array in arrays.items()}
    record["half"] = Array(rng.normal(0, 0.1, 30).astype(np.float16))
    record["norm.num_batches_tracked"] = Array(np.array(0, np.int64))
    return ArrayRecord(record)


def target() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(0, 1, array.shape) for name, array in initial().items()}


def trained(message: Message, context: Context) -> Message:
    """A client that goes a tenth of the way to a target, its own noise beside it."""
    record, server_round = message.content.array_records["arrays"], int(str(config_of(message)["server-round"]))
    rng = np.random.default_rng([context.node_id, server_round])
    new = {}
    for name, array in record.items():
        values = array.numpy()
        if name == "norm.num_batches_tracked":  # float64, once FedAvg has averaged it
            new[name] = Array(np.asarray(values + 1))
            continue
        assert values.dtype == initial()[name].numpy().dtype
        step = 0.1 * (target()[name] - values) * (1 + 0.1 * rng.normal(size=values.shape))
        new[name] = Array((np.abs(values + step) if "var" in name else values + step).astype(values.dtype))
    metrics = MetricRecord({"num-examples": 1, "loss": loss_of(record)})
    return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)


def evaluated(message: Message, context: Context) -> Message:
    record = message.content.array_records["arrays"]
    metrics = MetricRecord({"num-examples": 1, "loss": loss_of(record)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def config_of(message: Message) -> ConfigRecord:
    return message.content.config_records["config"]


def loss_of(record: ArrayRecord) -> float:
    wanted = {name: array for name, array in target().items() if name.endswith("weight")}
    return float(sum(np.square(record[name].numpy() - array).sum() for name, array in wanted.items()))


def app_with(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))
    app.train()(trained)
    app.evaluate()(evaluated)
    return app


class LocalGrid:
    """Flower's grid over a ClientApp of this process, counting the bytes of arrays."""

    def __init__(self, app: ClientApp, num_clients: int = CLIENTS) -> None:
        self.app = app
        self.contexts = {100 + i: self.context(100 + i) for i in range(num_clients)}
        self.num_bytes = {"up": 0, "down": 0}
        self.lost: set[tuple[int, int]] = set()  # the reply of a node in a round of training
        self.seen: list[RecordDict] = []

    def context(self, node: int) -> Context:
        return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"m{number}"
            self.num_bytes["down"] += size_of(message.content)
            assert counted(message.content) > 0
            node, server_round = message.metadata.dst_node_id, int(str(config_of(message)["server-round"]))
            training = message.metadata.message_type == "train"
            try:
                reply = self.app(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=8, reason=repr(error)), reply_to=message)
            if reply.has_content():
                self.num_bytes["up"] += size_of(reply.content)
                assert counted(reply.content) >= 0
                self.seen.append(reply.content)
            if not (training and (node, server_round) in self.lost):
                replies.append(reply)
        return replies


def counted(content: RecordDict) -> int:
    """By Flower's own count, which refuses empty values."""
    return sum(record.count_bytes() for record in content.values())


def size_of(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def run(strategy: Strategy, grid: LocalGrid, rounds: int = ROUNDS) -> tuple[float, ArrayRecord]:
    result = strategy.start(grid, initial(), rounds)  # type: ignore[arg-type]
    return loss_of(result.arrays), result.arrays


def test_an_app_is_coded_both_ways_and_learns_as_without() -> None:
    plain, coding = LocalGrid(app_with()), LocalGrid(app_with(coded()))
    dense_loss, dense = run(FedAvg(), plain)
    loss, arrays = run(Coded(FedAvg(), bits=2, down_bits=2), coding)
    start = loss_of(initial())
    assert (start - loss) / (start - dense_loss) > 0.93
    assert coding.num_bytes["up"] < plain.num_bytes["up"] / 8
    assert coding.num_bytes["down"] < plain.num_bytes["down"] / 8, "with evaluation, which is a second dense message"
    assert list(arrays) == list(dense)
    assert {name: a.dtype for name, a in arrays.items()} == {name: a.dtype for name, a in dense.items()}
    assert float(arrays["norm.num_batches_tracked"].numpy()) == pytest.approx(ROUNDS), "a counter travels exactly"
    assert np.allclose(arrays["norm.running_var"].numpy(), dense["norm.running_var"].numpy(), rtol=0.2)
    assert (arrays["norm.running_var"].numpy() > 0).all()


def test_what_a_client_sees_is_what_the_server_holds() -> None:
    seen: list[ArrayRecord] = []

    def spying(message: Message, context: Context, app: Any) -> Message:
        seen.append(message.content.array_records["arrays"])
        assert CODING not in message.content
        return app(message, context)  # type: ignore[no-any-return]

    strategy = Coded(FedAvg(fraction_evaluate=1.0), bits=1, down_bits=1)
    _, arrays = run(strategy, LocalGrid(app_with(coded(), spying)), rounds=3)
    for name, array in seen[-1].items():  # of the last evaluation
        assert array.data == arrays[name].data


@pytest.mark.parametrize("inner", [FedAvg, FedMedian, FedAdam])
def test_any_strategy_can_be_inside(inner: type[Strategy]) -> None:
    grid = LocalGrid(app_with(coded()))
    loss, _ = run(Coded(inner(), bits=4, down_bits=4), grid)
    dense_loss, _ = run(inner(), LocalGrid(app_with()))
    start = loss_of(initial())
    assert (start - loss) / (start - dense_loss) > 0.9


def test_in_place_of_fedavg_as_a_base_class() -> None:
    """A strategy that meters its messages sees what travels."""

    class Metered(CodedFedAvg):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.metered = 0

        def configure_train(self, *args: Any) -> Iterable[Message]:
            messages = list(super().configure_train(*args))
            self.metered += sum(size_of(message.content) for message in messages)
            return messages

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            self.metered += sum(size_of(reply.content) for reply in replies)
            return super().aggregate_train(server_round, replies)

    strategy = Metered(bits=0.5, down_bits=0.5, fraction_evaluate=0.0)
    grid = LocalGrid(app_with(coded()))
    loss, _ = run(strategy, grid)
    assert loss < loss_of(initial()) * 0.9
    assert strategy.metered == sum(grid.num_bytes.values()) == sum(strategy.coding.num_bytes.values())


@pytest.mark.parametrize("name", [name for name in names_for_any_layout() if name != "b-only"])
def test_with_every_codec(name: str) -> None:
    loss, _ = run(Coded(FedAvg(), codec=name, bits=4, down_bits=4), LocalGrid(app_with(coded())), rounds=3)
    assert loss < loss_of(initial())


def test_an_app_with_the_mod_serves_other_strategies_as_before() -> None:
    alone, _ = run(FedAvg(), LocalGrid(app_with()), 3)
    assert run(FedAvg(), LocalGrid(app_with(coded())), 3)[0] == pytest.approx(alone)


def test_clients_that_lose_what_they_hold_are_sent_it_in_the_next_round() -> None:
    grid = LocalGrid(app_with(coded()))
    strategy = Coded(FedAvg(fraction_evaluate=0.0, min_train_nodes=1), bits=2, down_bits=2)
    aggregate = strategy.aggregate_train
    answered: list[int] = []

    def counting(server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        answered.append(sum(LACKS not in reply.content for reply in replies))
        if server_round in (2, 3):  # the node is started again
            grid.contexts[100] = grid.context(100)
        if server_round == 5:  # another run's, or a copy of another client's
            grid.contexts[101].state = grid.contexts[102].state
        return aggregate(server_round, replies)

    strategy.aggregate_train = counting  # type: ignore[method-assign]
    loss, _ = run(strategy, grid)
    assert answered == [3, 3, 2, 3, 3, 3, 3, 3] or answered[2] == 2
    assert all(one >= 2 for one in answered)
    assert loss < loss_of(initial())


def test_a_reply_that_is_lost_costs_nothing_but_its_time() -> None:
    """What it carried goes into the next payload."""
    grid = LocalGrid(app_with(coded()))
    grid.lost = {(100, 2), (101, 3), (102, 3), (100, 5)}
    loss, _ = run(Coded(FedAvg(), bits=2, down_bits=2), grid)
    whole, _ = run(Coded(FedAvg(), bits=2, down_bits=2), LocalGrid(app_with(coded())))
    assert loss < loss_of(initial()) - 0.9 * (loss_of(initial()) - whole)


def test_what_a_client_makes_up_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    strategy = Coded(FedAvg(fraction_evaluate=0.0), bits=2, down_bits=2)
    grid = LocalGrid(app_with(coded()))
    honest = grid.app

    def lying(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if context.node_id == 100:
            data = [b"", b"\x00" * 40, bytes(range(256))][int(str(config_of(message)["server-round"])) % 3]
            reply.content["arrays"] = in_one_array(PAYLOAD, PAYLOAD_TYPE, data)
        return reply

    grid.app = lying  # type: ignore[assignment]
    loss, _ = run(strategy, grid, rounds=4)
    assert loss < loss_of(initial())
    assert caplog.text.count("the reply of node 100 is left out") == 4


def test_an_apps_own_fault_is_its_error() -> None:
    app = ClientApp(mods=[coded()])

    @app.train()
    def others(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"another": Array(np.ones(3, np.float32))})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = LocalGrid(app)
    strategy = Coded(FedAvg(fraction_evaluate=0.0))
    arrays, config = initial(), ConfigRecord()
    replies = grid.send_and_receive(strategy.configure_train(1, arrays, config, grid))  # type: ignore[arg-type]
    assert all("are not those that the server sent" in str(reply.error.reason) for reply in replies)
    assert strategy.aggregate_train(1, replies) == (None, None)


def test_settings_out_of_range_are_refused_before_any_work() -> None:
    for settings in ({"bits": 0.0}, {"down_bits": -1.0}, {"codec": "zip"}, {"feedback": 2.0}):
        with pytest.raises(CodecError):
            Coded(FedAvg(), **settings)
    with pytest.raises(CodecError, match="no floats"):
        AppArrays.of(ArrayRecord({"count": Array(np.array([1, 2]))}))


def test_a_budget_that_no_payload_fits_into_is_refused_before_the_first_message() -> None:
    for key in ("bits", "down_bits"):
        strategy = Coded(FedAvg(fraction_evaluate=0.0), **{key: 0.01})  # type: ignore[arg-type]
        grid = LocalGrid(app_with(coded()))
        with pytest.raises(BudgetError, match=f"^{key}=0.01 of [0-9,]+ parameters"):
            strategy.configure_train(1, initial(), ConfigRecord(), grid)  # type: ignore[arg-type]


def test_a_server_that_names_arrays_without_sending_them_takes_no_memory() -> None:
    grid = LocalGrid(app_with(coded()))
    strategy = Coded(FedAvg(fraction_evaluate=0.0))
    message, *_ = strategy.configure_train(1, initial(), ConfigRecord(), grid)  # type: ignore[arg-type]
    huge = AppArrays({"w": Spec("float32", (1 << 19, 1 << 20))})
    turn = ConfigRecord({**message.content.config_records[CODING], "arrays": huge.pack()})
    message.content = RecordDict({**message.content, CODING: turn})
    (reply,) = grid.send_and_receive([message])
    assert "does not send them" in str(reply.error.reason)


def test_arrays_are_put_into_matrices_and_come_back() -> None:
    record = initial()
    arrays = AppArrays.of(record)
    assert arrays.matrices["q.lora_A.weight"] == (RANK, WIDTH)
    assert arrays.matrices["head.weight"] == (RANK, 480), "folded to as many rows as factors have"
    assert {"norm.running_var", "norm.num_batches_tracked"} == set(arrays.exact_of(record))
    again = AppArrays.unpack(arrays.pack())
    assert list(again.specs.items()) == list(arrays.specs.items())
    back = arrays.to_record(arrays.to_adapter(record), arrays.exact_of(record))
    assert all(back[name].data == array.data for name, array in record.items())


def test_a_turn_that_is_none_is_refused() -> None:
    strategy = Coded(FedAvg(fraction_evaluate=0.0))
    grid = LocalGrid(app_with(coded()))
    (message, *_) = strategy.configure_train(1, initial(), ConfigRecord(), grid)  # type: ignore[arg-type]
    turn = message.content.config_records[CODING]
    assert Turn.unpack(turn).pack() == turn
    generator = torch.Generator().manual_seed(0)
    for key in list(turn):
        for value in (None, "", "{", b"\xff" * 9, "[" * 5000, -1, 3.5):
            bad = ConfigRecord({**turn, key: value}) if value is not None else ConfigRecord(turn)  # type: ignore
            if value is None:
                del bad[key]
            try:
                Turn.unpack(bad)
            except CodecError:
                continue
    arrays = bytearray(turn["arrays"])  # type: ignore[arg-type]
    for _ in range(300):
        place = int(torch.randint(len(arrays), (), generator=generator))
        changed = bytearray(arrays)
        changed[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        try:
            Turn.unpack(ConfigRecord({**turn, "arrays": bytes(changed)}))
        except CodecError:
            continue


def test_a_round_that_comes_to_nothing_spoils_no_later_one() -> None:
    class Fails(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            found = super().aggregate_train(server_round, replies)
            answered.append(len(list(replies)))
            return (None, None) if server_round == 2 else found

    answered: list[int] = []
    loss, _ = run(Coded(Fails(fraction_evaluate=0.0), bits=2, down_bits=2), LocalGrid(app_with(coded())))
    assert answered == [CLIENTS] * ROUNDS
    assert loss < loss_of(initial()) / 2


def test_a_second_start_is_a_run_of_its_own() -> None:
    strategy = Coded(FedAvg(fraction_evaluate=0.0), bits=2, down_bits=2)
    grid = LocalGrid(app_with(coded()))
    first, _ = run(strategy, grid, rounds=4)
    run_id = strategy.coding.run_id
    second, _ = run(strategy, grid, rounds=4)
    assert second == pytest.approx(first, rel=1e-6)
    assert strategy.coding.run_id != run_id


def test_an_evaluation_that_answers_with_arrays_is_left_alone() -> None:
    app = ClientApp(mods=[coded()])
    app.train()(trained)

    @app.evaluate()
    def with_arrays(message: Message, context: Context) -> Message:
        reply = evaluated(message, context)
        reply.content["matrix"] = ArrayRecord({"confusion": Array(np.eye(3, dtype=np.float32))})
        return reply

    seen: list[str] = []

    class Looks(FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
            seen.extend(name for reply in replies for name in reply.content.array_records["matrix"])
            return None

    loss, _ = run(Coded(Looks(), bits=2, down_bits=2), LocalGrid(app), rounds=3)
    alone, _ = run(Coded(FedAvg(), bits=2, down_bits=2), LocalGrid(app_with(coded())), rounds=3)
    assert seen == ["confusion"] * 3 * CLIENTS
    assert loss == pytest.approx(alone, rel=1e-6)


def test_what_cannot_be_coded_is_refused_by_name() -> None:
    class Personal(FedAvg):
        def configure_train(self, *args: Any) -> Iterable[Message]:
            messages = list(super().configure_train(*args))
            own = ArrayRecord({name: Array(np.asarray(array.numpy() * 2)) for name, array in initial().items()})
            messages[0].content = RecordDict({**messages[0].content, "arrays": own})
            return messages

    with pytest.raises(CodecError, match="other arrays than the global ones"):
        run(Coded(Personal()), LocalGrid(app_with(coded())), 1)

    class Starts(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    with pytest.raises(CodecError, match="Starts has a start"):
        Coded(Starts())
    endless = ArrayRecord({**initial(), "mask": Array(np.full((8, 8), -np.inf, np.float32))})
    with pytest.raises(CodecError, match="'mask' holds NaN, infinity"):
        Coded(FedAvg()).start(LocalGrid(app_with(coded())), endless, 1)


@pytest.mark.parametrize("codec", ["rotated", "projection", "learned"])
def test_halves_at_their_largest_stay_finite(codec: str) -> None:
    rng = np.random.default_rng(0)
    half = np.where(rng.normal(size=200) > 0, 65504, -65504).astype(np.float16)
    arrays = ArrayRecord({"half": Array(half), "w": Array(rng.normal(size=(8, 64)).astype(np.float32))})
    app = ClientApp(mods=[coded()])

    @app.train()
    def nearly_the_same(message: Message, context: Context) -> Message:
        given = message.content.array_records["arrays"]
        new = {name: Array((array.numpy() * np.float32(0.999)).astype(array.dtype)) for name, array in given.items()}
        return Message(
            RecordDict({"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    strategy = Coded(FedAvg(fraction_evaluate=0.0), bits=2, down_bits=2, codec=codec)
    found = strategy.start(LocalGrid(app), arrays, 4).arrays
    assert all(np.isfinite(array.numpy()).all() for array in found.values())


def garbage(array: Array, kind: str) -> Array:
    """An array of seven values that is none, or another one than it says."""
    if kind == "bytes":
        return Array("float32", (40,), "numpy.ndarray", b"\x93NUMPY" + bytes(60))
    if kind == "shape":
        return Array("float32", (40,), "numpy.ndarray", Array(np.zeros(7, np.float32)).data)
    if kind == "type":
        return Array("float32", (40,), "another", array.data)
    if kind == "text":
        return Array("float32", (40,), "numpy.ndarray", Array(np.array(["x"] * 40)).data)
    head = Array(np.zeros(40, np.float32)).data.replace(b"(40,)", b"(1 << 33,)"[:5])
    return Array("float32", (40,), "numpy.ndarray", head[:130])


@pytest.mark.parametrize("kind", ["bytes", "shape", "type", "text", "cut"])
def test_arrays_that_travel_as_they_are_are_looked_at_first(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(app_with(coded()))
    honest = grid.app

    def lying(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if context.node_id == 100:
            exact = reply.content.array_records[EXACT]
            exact["norm.running_var"] = garbage(exact["norm.running_var"], kind)
        return reply

    grid.app = lying  # type: ignore[assignment]
    loss, _ = run(Coded(FedAvg(fraction_evaluate=0.0), bits=2, down_bits=2), grid, rounds=3)
    assert loss < loss_of(initial())
    assert caplog.text.count("the reply of node 100 is left out: array 'norm.running_var'") == 3


@pytest.mark.parametrize("what", ["held", "arrays", "head", "residual", "all"])
def test_a_damaged_memory_heals(what: str) -> None:
    grid = LocalGrid(app_with(coded()))
    strategy = Coded(FedAvg(fraction_evaluate=0.0, min_train_nodes=1), bits=2, down_bits=2)
    aggregate, answered = strategy.aggregate_train, list[int]()

    def damaging(server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        answered.append(sum(reply.has_content() and LACKS not in reply.content for reply in replies))
        state = grid.contexts[100].state
        if server_round == 2 and what == "held":
            state["gradcodec.held"] = ArrayRecord({name: Array(np.ones(3, np.float32)) for name in ("start", "moved")})
        elif server_round == 2 and what == "arrays":
            state.config_records["gradcodec.head"]["arrays"] = b"garbage"
        elif server_round == 2 and what == "head":
            del state.config_records["gradcodec.head"]["round"]
        elif server_round == 2 and what == "residual":
            state["gradcodec.residual"] = ArrayRecord({"target": Array("float32", (3,), "numpy.ndarray", b"x")})
        elif server_round == 2:
            state.clear()
        return aggregate(server_round, replies)

    strategy.aggregate_train = damaging  # type: ignore[method-assign]
    run(strategy, grid, rounds=5)
    assert answered[3:] == [CLIENTS, CLIENTS], "at most one round is missed"


def test_an_app_that_clears_its_state_does_not_clear_ours() -> None:
    app = ClientApp(mods=[coded()])

    @app.train()
    def forgetting(message: Message, context: Context) -> Message:
        context.state = RecordDict() if context.node_id == 100 else context.state
        context.state.clear()
        return trained(message, context)

    answered: list[int] = []

    class Counts(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            answered.append(len(list(replies)))
            return super().aggregate_train(server_round, replies)

    run(Coded(Counts(fraction_evaluate=0.0), bits=2, down_bits=2), LocalGrid(app), rounds=4)
    assert answered == [CLIENTS] * 4


def test_nodes_that_left_make_no_keys() -> None:
    strategy = Coded(FedAvg(fraction_evaluate=0.0), bits=2, down_bits=1)
    grid = LocalGrid(app_with(coded()))
    nodes, sizes = list(grid.contexts), list[int]()

    def ids() -> list[int]:
        return nodes if sizes else [*nodes, *range(1000, 1060)]

    original = strategy.inner.configure_train

    def counting(server_round: int, arrays: ArrayRecord, config: ConfigRecord, _: Any) -> Any:
        grid.get_node_ids = lambda: nodes  # type: ignore[method-assign]
        messages = original(server_round, arrays, config, grid)  # type: ignore[arg-type]
        grid.get_node_ids = ids  # type: ignore[method-assign]
        return messages

    strategy.inner.configure_train = counting  # type: ignore
    aggregate = strategy.aggregate_train

    def noting(server_round: int, replies: Iterable[Message]) -> Any:
        sizes.append(grid.num_bytes["down"])
        return aggregate(server_round, replies)

    strategy.aggregate_train = noting  # type: ignore[method-assign]
    run(strategy, grid, rounds=8)
    rounds = np.diff(sizes)
    assert rounds[-1] < 1.5 * rounds[0], "a step, not a key"
