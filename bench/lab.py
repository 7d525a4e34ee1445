"""Federated runs in one process, for benches that make many of them: real training, codec and strategies, no Flower
processes. Ten clients of the embedded task and the small model; a client may be malicious (``attackers.py``).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from adapters.base import load_tokenizer
from adapters.finetune import DivergedError, finetune
from adapters.model import adapter_parts, adapter_shapes, get_adapter, load_model, set_adapter
from adapters.settings import TrainSettings
from adapters.windows import Windows
from bench.aggregate import AllPresent, Unobserved
from bench.attackers import Attack, norm_of
from conf import CHECKOUT
from conf.basis import codecs_of
from conf.schema import Settings
from gradcodec.build import byte_budget
from gradcodec.errors import DivergedError as UpdateDivergedError
from gradcodec.exchange import Residual, encode_update
from gradcodec.frame import Frame, pack, unpack
from gradcodec.intake import Intake
from gradcodec.layout import Layout
from gradcodec.transfers import context_of
from strategies.broadcast import DenseBroadcaster
from strategies.build import build_inner
from strategies.coded import CodedReceiver
from strategies.errors import RoundError
from strategies.federated import FederatedStrategy, Limits, Ways
from strategies.norms import NormBound
from strategies.sampling import Sampling
from strategies.settings import StrategySettings
from strategies.tensors import from_record, to_record
from strategies.wire import ARRAYS, METRICS, NUM_EXAMPLES, PARTITION, REPLY_METRICS, SERVER_ROUND, wrap_payload
from tasks.shards import load_shards
from tasks.windows import heldout_loss

CLIENTS = 10
ROOT_WINDOWS = 4
"""Of every client's text, which the server has for FLTrust and no client trains on."""
WINDOW, BATCH, HELDOUT = 64, 4, 8
RENAMED = 97
"""How far the token ids of a client that is ``renamed`` lie from the others'."""

Adapter = dict[str, Tensor]


@dataclass(frozen=True)
class Defence:
    """A strategy and its bounds."""

    about: str
    strategy: StrategySettings
    usual_norms: float | None = None  # ``strategy.max_norm``, in usual norms of an honest first round


@dataclass
class Outcome:
    """One run's end: held-out loss by client, and how many rounds came to nothing. None: training diverged."""

    by_client: list[float] | None
    lost_rounds: int
    seconds: float

    def loss(self, clients: Sequence[int]) -> float | None:
        return None if self.by_client is None else mean(self.by_client[client] for client in clients)


@dataclass
class Lab:
    """What all runs of a seed share: model, data, codec, and what was trained from an adapter that runs have in common
    (the first one)."""

    seed: int
    rounds: int
    train: TrainSettings
    renamed: tuple[int, ...] = ()  # clients whose token ids are others
    known: dict[Any, Adapter] = field(default_factory=dict)
    first_payloads: dict[int, tuple[bytes, Residual]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = Settings(seed=self.seed, run_id=f"attacks-{self.seed}")
        self.settings.model.path = str(CHECKOUT / "assets" / "tiny-llama")
        self.settings.task.window, self.settings.task.heldout_windows = WINDOW, HELDOUT
        self.model = load_model(self.settings.model, self.settings.lora, self.seed)
        self.vocabulary = int(self.model.get_base_model().config.vocab_size)
        self.initial = get_adapter(self.model)
        self.layout = Layout.of(adapter_shapes(self.model), adapter_parts(self.model))
        self.codecs = codecs_of(self.settings, self.layout, self.initial)
        shards = list(load_shards(self.settings.task, load_tokenizer(self.settings.model), range(CLIENTS), CLIENTS))
        own = [self._own(client, shard.train) for client, shard in enumerate(shards)]
        self.windows = [windows[ROOT_WINDOWS:] for windows in own]
        self.root = Windows.cat([windows[:ROOT_WINDOWS] for windows in own])
        self.heldout = [self._own(client, shard.heldout) for client, shard in enumerate(shards)]
        self.rehearsed = self.trained_root(0, self.initial)
        self.usual_norm = float(np.median([norm_of(self.trained(1, c, self.initial)) for c in range(CLIENTS)]))

    def trained(
        self, server_round: int, client: int, adapter: Mapping[str, Tensor], attack: Attack | None = None
    ) -> Adapter:
        """What a client's training changes of an adapter."""
        key = (client, None if attack is None else attack.about)
        if server_round == 1 and key in self.known:  # every run starts from the same adapter
            return self.known[key]
        windows = self.windows[client] if attack is None else attack.poison(self.windows[client], self.vocabulary)
        seed = int(np.random.SeedSequence([self.seed, server_round, client]).generate_state(1)[0])
        update = self._finetuned(adapter, windows, seed)
        if server_round == 1:
            self.known[key] = update
        return update

    def trained_root(self, server_round: int, adapter: Mapping[str, Tensor]) -> Adapter:
        """The server's own update for FLTrust."""
        return self._finetuned(adapter, self.root, server_round)

    def run(self, defence: Defence, attack: Attack, malicious: Sequence[int]) -> Outcome:
        """One federation, from the first adapter on."""
        started, lost = time.perf_counter(), 0
        strategy = self._strategy(defence)
        clients = Clients(self, strategy, attack, malicious)
        adapter = {name: tensor.clone() for name, tensor in self.initial.items()}
        try:
            for server_round in range(1, self.rounds + 1):
                asked = list(
                    strategy.configure_train(server_round, to_record(adapter), ConfigRecord(), cast(Grid, None))
                )
                for number, message in enumerate(asked):
                    message.metadata.__dict__["_message_id"] = f"{server_round}/{number}"
                try:
                    arrays, _ = strategy.aggregate_train(server_round, clients.replies(server_round, asked))
                except RoundError:
                    lost += 1
                    continue
                assert arrays is not None
                adapter = from_record(arrays)
            by_client = self.losses(adapter)
        except (DivergedError, UpdateDivergedError):
            return Outcome(None, lost, time.perf_counter() - started)
        finite = all(map(math.isfinite, by_client))
        return Outcome(by_client if finite else None, lost, time.perf_counter() - started)

    def _finetuned(self, adapter: Mapping[str, Tensor], windows: Windows, seed: int) -> Adapter:
        self.model.zero_grad()  # training that diverged left its gradients
        return finetune(self.model, adapter, windows, self.train, seed)[0]

    def losses(self, adapter: Mapping[str, Tensor]) -> list[float]:
        """Held-out loss of every client, nats per token."""
        set_adapter(self.model, adapter)
        return [heldout_loss(self.model, windows) for windows in self.heldout]

    def _own(self, client: int, windows: Windows) -> Windows:
        if client not in self.renamed:
            return windows
        return Windows((windows.ids + RENAMED) % self.vocabulary, windows.counted)

    def _strategy(self, defence: Defence) -> FederatedStrategy:
        settings = copy.deepcopy(defence.strategy)
        if defence.usual_norms is not None:
            settings.max_norm = defence.usual_norms * self.usual_norm
        intake = Intake(
            self.codecs.at(self.initial),
            self.settings.run_id,
            range(CLIENTS),
            byte_budget(self.settings.codec, self.layout),
        )
        strategy = FederatedStrategy(
            build_inner(settings, self.trained_root),
            Ways(DenseBroadcaster(), CodedReceiver(intake, self.codecs)),
            AllPresent(cast(Grid, None), CLIENTS, ConfigRecord(), Unobserved()),
            Sampling(CLIENTS, CLIENTS, self.seed),
            NormBound(settings.clip_norm_ratio, settings.max_norm_ratio, settings.max_norm),
            Unobserved(),
            Limits(),
        )
        strategy.foresee(self.rehearsed)
        return strategy


@dataclass
class Clients:
    """Those of one run, honest and malicious."""

    lab: Lab
    strategy: FederatedStrategy
    attack: Attack
    malicious: Sequence[int]
    residuals: dict[int, Residual] = field(default_factory=dict)

    def replies(self, server_round: int, asked: Sequence[Message]) -> Iterator[Message]:
        """What every client answers, one at a time."""
        lab, adapter = self.lab, {name: tensor.clone() for name, tensor in self.strategy.current.items()}
        honest = {c: lab.trained(server_round, c, adapter) for c in range(CLIENTS) if c not in self.malicious}
        common = None if self.attack.update is None else self._frame(self.attack.update([*honest.values()]))
        for message in asked:
            client = message.metadata.dst_node_id - 1
            context = context_of(lab.settings.run_id, server_round, client)
            if client in honest:
                payload = self._honest_payload(server_round, client, honest[client], context)
            elif self.attack.present:
                frame = common or self._frame(lab.trained(server_round, client, adapter, self.attack))
                payload = pack(self.attack.forge(frame), context)
            else:
                continue
            metrics = MetricRecord(dict.fromkeys(REPLY_METRICS, 1.0))
            metrics[NUM_EXAMPLES] = lab.train.steps * lab.train.batch_size
            metrics[PARTITION], metrics[SERVER_ROUND] = client, server_round
            yield Message(RecordDict({ARRAYS: wrap_payload(payload), METRICS: metrics}), reply_to=message)

    def _honest_payload(self, server_round: int, client: int, update: Adapter, context: bytes) -> bytes:
        """With error feedback, as a client does it; the first round's, which all runs have in common, once."""
        known = self.lab.first_payloads
        if server_round == 1 and client in known:
            payload, self.residuals[client] = known[client]
            return payload
        carried = None
        if (before := self.residuals.get(client)) is not None:
            accepted = self._receiver.intake.accepted.get(client, "")
            carried = before.carried(accepted, self.lab.settings.codec.feedback)
        payload, self.residuals[client] = self._encoded(update, carried, context)
        if server_round == 1:
            known[client] = payload, self.residuals[client]
        return payload

    def _frame(self, update: Mapping[str, Tensor]) -> Frame:
        """Of an attacker, who has no residual."""
        return unpack(self._encoded(update, None, b"")[0], 1)

    def _encoded(self, update: Mapping[str, Tensor], carried: Tensor | None, context: bytes) -> tuple[bytes, Residual]:
        return encode_update(
            update,
            carried,
            codec=self.lab.codecs.at(self.strategy.current),
            max_bytes=byte_budget(self.lab.settings.codec, self.lab.layout),
            side=self._receiver.side,
            context=context,
        )

    @property
    def _receiver(self) -> CodedReceiver:
        assert isinstance(self.strategy.receiver, CodedReceiver)
        return self.strategy.receiver
