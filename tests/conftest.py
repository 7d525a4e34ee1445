"""What several tests share: small adapters, recorded updates, and an in-process Flower Grid over the real ClientApp."""

from __future__ import annotations

import os

# before torch is loaded: threads of several workers that wait for each other cost far more than they save
os.environ.setdefault("OMP_NUM_THREADS", "1")

from conf.startup import collect_seldom

collect_seldom()

import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import server.backends.inprocess
import server.run.answers
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.fit import Sample, fit_learned
from gradcodec.learned.tables import LearnedTables
from strategies.folding import unfold

hypothesis.settings.register_profile("untimed", deadline=None)  # how long a case takes is the machine's affair
hypothesis.settings.load_profile("untimed")
server.run.answers.MOST_TOKENS = 4  # nobody reads what the tests' models write
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # outside a Flower process Message() needs them


SHAPES = {
    "layers.0.q.lora_A.weight": (8, 64),
    "layers.0.q.lora_B.weight": (64, 8),
    "layers.1.v.lora_A.weight": (8, 64),
    "layers.1.v.lora_B.weight": (48, 8),
}


def apply_changes(settings: Any, changes: Mapping[str, object]) -> None:
    """Sets ``group__key``, or ``key`` of the settings themselves, to each value."""
    for key, value in changes.items():
        holder, _, attribute = key.rpartition("__")
        setattr(getattr(settings, holder) if holder else settings, attribute, value)


def heavy_tailed_update(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Low-rank, heavy-tailed matrices, as gradients are; around 1e-3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    update = {}
    for name, (rows, columns) in shapes.items():
        strong = normal(rows, 2) @ normal(2, columns) * normal(1, columns).abs()
        update[name] = 1e-3 * (strong + 0.3 * normal(rows, columns))
    return update


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout.of(SHAPES)


@pytest.fixture(scope="session")
def learned_tables(layout: Layout) -> LearnedTables:
    """A quickly trained codec; trained once for the whole session."""
    blocks = [layout.to_blocks(heavy_tailed_update(seed)) for seed in range(24)]
    samples = [Sample(b, principal_axes(b, layout)) for b in blocks]
    return fit_learned(samples, layout, directions=32, passes=3)


@pytest.fixture(scope="session")
def learned(layout: Layout, learned_tables: LearnedTables) -> LearnedCodec:
    return LearnedCodec(layout, learned_tables, b"test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first: it mostly waits, and as one of the last it keeps all others waiting."""
    items.sort(key=lambda item: item.path.name != "test_secure_grpc.py")


def pytest_collection_finish() -> None:
    """What is loaded by now stays: no sweep of memory need look at it again."""
    gc.freeze()


RunProgram = Callable[[Callable[[], object], Sequence[str]], tuple[int, str, str]]


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[RunProgram]:
    """Runs a program's ``main`` in this process: its exit status, standard output and standard error."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(main: Callable[[], object], arguments: Sequence[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        capfd.readouterr()
        status, said = 0, ""
        try:
            main()
        except SystemExit as end:  # as Python itself ends
            status, said = (end.code, "") if isinstance(end.code, int) else (int(end.code is not None), f"{end.code}\n")
        out, err = capfd.readouterr()
        return status, out, err + said

    yield run
    signal.signal(signal.SIGTERM, handler)


class InProcessGrid(server.backends.inprocess.InProcessGrid):
    """Answers at once, keeps what was sent, and may lose a reply; here what is sent lies unfolded."""

    def __init__(self, app: ClientApp, num_nodes: int, node_config: dict[str, Any] | None = None) -> None:
        super().__init__(app, num_nodes, node_config)
        self.sent: list[Message] = []
        self.waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            message.content = unfold(message.content)
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            if (reply := self.answer(message)) is not None:
                self.waiting[message.metadata.message_id] = reply
        return ids

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is not None and reply.has_content():
            reply.content = unfold(reply.content)
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """All that are ready; as on a network, their order is not that of the messages."""
        return [self.waiting.pop(i) for i in sorted(set(message_ids) & self.waiting.keys(), reverse=True)]
