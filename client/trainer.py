"""What a node holds between messages: base model, tokenised data, codec; and the work of one message.

Knows settings, libraries and the disk; must not know Flower's messages (``app.py`` does).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters.base import check_vocabulary, load_tokenizer, max_positions, resolve_device
from adapters.finetune import finetune
from adapters.footprint import check_fits
from adapters.gguf import model_folder
from adapters.model import (
    Adapter,
    adapter_parts,
    adapter_shapes,
    get_adapter,
    get_local,
    load_model,
    on_host,
    set_adapter,
    set_local,
)
from adapters.private import finetune_privately
from adapters.settings import for_round, is_hub_name, num_examples
from adapters.team import Team
from client.console import note, round_line
from client.line import Line
from client.local import load_local, save_local
from client.memory import DiskMemory
from client.private import Guard, Owner, keep_terms, secret_of, with_noise
from client.work import (
    LINE,
    MAX_BITS,
    MAX_EPSILON,
    MAX_RANK,
    TRUST,
    UPLOAD_SECONDS,
    Arrays,
    Evaluated,
    Overrides,
    Trained,
    Work,
)
from conf import CHECKOUT
from conf.basis import codecs_of
from conf.checks import check_settings
from conf.footprint import client_memory
from conf.limits import ClientLimits, limits_of, refusal_of
from conf.remedies import COPY_IT, codec_remedies
from conf.schema import Settings
from conf.sums import terms_of
from gradcodec.build import byte_budget
from gradcodec.client import ClientEnd, LacksError, Place
from gradcodec.exchange import encode_update
from gradcodec.layout import Layout, rank_first
from gradcodec.rounds import Codecs, codec_at
from gradcodec.sums import PublicRound, basis_at
from privacy.errors import PrivacyError
from strategies.settings import StrategySettings
from strategies.wire import MOST_LOSS, TRUST_VARIABLE
from tasks.settings import TaskSettings, check_window
from tasks.shards import Shard, load_shard, what_is_lost
from tasks.windows import heldout_loss

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """What takes long to load, and the adapter that the seed gave the model before it was trained."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    seeded: Adapter
    seeded_local: Adapter


class Trainer:
    """One per process and settings; serves any partition."""

    def __init__(
        self,
        settings: Settings,
        own_data: bool = False,
        max_epsilon: float | None = None,
        own_limits: ClientLimits = ClientLimits(),  # noqa: B008 (frozen)
        line: Line | None = None,
    ) -> None:
        """With ``own_data`` the task's file or folder is this client's alone and is not dealt out; ``max_epsilon`` is
        what the node's owner allows of all runs together, ``own_limits`` of every message, ``line`` what is known of
        the one to the server."""
        check_settings(settings)
        self.settings = settings
        self.own_data = own_data
        self.max_epsilon = max_epsilon
        self.own_limits = own_limits
        self.line = line
        self._shards: dict[int, Shard] = {}
        self._guards: dict[int, Guard] = {}
        self._source = _source_of(settings)
        self._given: _Loaded | None = None

    def take_over(self, old: Trainer) -> bool:
        """Model and tokenizer of the trainer before, if this one would load the same. Gives whether they are kept."""
        if self._source == old._source:
            loaded = "model" in old.__dict__
            self._given = _Loaded(old.model, old.tokenizer, old.seeded, old.seeded_local) if loaded else old._given
        return self._given is not None

    @cached_property
    def model(self) -> PeftModel:
        if self._given is not None:
            self.seeded, self.seeded_local = self._given.seeded, self._given.seeded_local
            return self._given.model
        model = load_model(self.settings.model, self.settings.lora, self.settings.seed)
        self.seeded, self.seeded_local = on_host(get_adapter(model)), get_local(model)
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._given is not None:
            return self._given.tokenizer
        tokenizer = load_tokenizer(self.settings.model)
        check_vocabulary(self.settings.model, tokenizer)
        return tokenizer

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(adapter_shapes(self.model), adapter_parts(self.model))

    @cached_property
    def codecs(self) -> Codecs:
        layout = self.layout
        with codec_remedies(COPY_IT):
            return codecs_of(self.settings, layout, self.seeded, self.model.device)

    @cached_property
    def end(self) -> ClientEnd:
        settings = self.settings.codec
        if self.settings.privacy.noise == "sum":  # what is left behind would have no noise in it
            settings = dataclasses.replace(settings, feedback=0.0)
        return ClientEnd(codec_at(self.codecs, self.layout), self.layout, settings, self.settings.run_id)

    def shard(self, partition: int) -> Shard:
        if partition not in self._shards:
            task, client, sharers = self.settings.task, partition, self.settings.federation.num_clients
            if self.own_data:
                task, client, sharers = dataclasses.replace(task, partition="iid", partition_by=None), 0, 1
            check_window(task, max_positions(self.settings.model))
            shard = self._shards[partition] = self._read(task, client, sharers)
            if self.own_data:  # the server warns of what it sees itself
                for warning in what_is_lost([shard], task):
                    _LOG.warning(warning)
        return self._shards[partition]

    def _read(self, task: TaskSettings, client: int, sharers: int) -> Shard:
        """Raises ValueError: the data cannot be used. Why may quote them: where they are protected that stays here."""
        tokenizer = self.tokenizer
        try:
            return load_shard(task, tokenizer, client, sharers)
        except ValueError as error:
            if not self.settings.privacy.protects:
                raise
            note(f"its data cannot be used: {error}")
            raise ValueError("its data cannot be used; what is wrong with them its own log says alone") from None

    def guard(self, partition: int, memory: Path) -> Guard | None:
        """What hides this partition's data; None: the run asks for nothing of the kind."""
        if not self.settings.privacy.is_private:
            return None
        if partition not in self._guards:
            self._guards[partition] = Guard(self.settings, len(self.shard(partition).train), memory, partition)
        return self._guards[partition]

    def allow(self, work: Work) -> None:
        """Counts this answer against the client's privacy budget, once.

        Raises:
            BudgetSpentError: it is spent.
            PrivacyError: the node's owner does not allow for this run, or it has changed its terms.
        """
        keep_terms(self.settings, work.memory, work.partition)
        Owner(work.memory.parent, self.max_epsilon).enter(self.settings)
        if (guard := self.guard(work.partition, work.memory)) is not None:
            guard.spend(work.server_round, self._secret(work))

    def check(self, partition: int, memory: Path | None = None) -> None:
        """Loads everything that training needs. Raises ValueError: something is missing or does not fit, or nobody
        knows what was released of the partition, as the run's ``memory`` says."""
        if memory is not None:  # first: what else is refused may quote the data
            Owner(memory.parent, self.max_epsilon).check(self.settings)
        self.shard(partition)
        if memory is not None:
            self.guard(partition, memory)
        if "model" not in self.__dict__:  # once it is in use, its memory is no longer free
            needed = client_memory(self.settings)
            if self._given is not None:
                needed = dataclasses.replace(needed, weights=0)
            check_fits(needed, resolve_device(self.settings.model))
        shapes = adapter_shapes(self.model)
        if self._limits(partition).rank is not None and (name := _wider_than_long(shapes)):
            raise ValueError(f"{name!r} has more ranks than its layer has inputs or outputs: no node can train fewer")
        if self.settings.arm == "coded":
            layout, device = self.layout, self.model.device
            any_update = {name: torch.full(shape, 1e-3, device=device) for name, shape in layout.shapes.items()}
            codec = self.codecs.at(self.seeded)
            encode_update(any_update, None, codec=codec, max_bytes=byte_budget(self.settings.codec, layout))

    def train(self, work: Work, team: Team | None = None) -> Trained:
        """Trains on a partition, alone or with a team whose others call ``finetune``, and encodes what changed."""
        settings = self.settings
        try:
            work = self.resolved(work)
        except LacksError as error:
            return Trained.nothing(error.holds)
        assert work.adapter is not None
        start = time.perf_counter()
        self.allow(work)
        limits = self._limits(work.partition)
        update, loss = self.finetune(work, team or Team())
        noised_here = settings.privacy.name == "client_dp" and not settings.privacy.is_discrete
        if noised_here and (guard := self.guard(work.partition, work.memory)) is not None:
            update = guard.hidden(update, self._secret(work))  # before coding, so that no residual holds anything else
        if limits.rank is not None:
            for name, change in update.items():
                rank_first(name, change)[limits.rank :] = 0  # noise lies there as well
        trained = time.perf_counter()
        payload = self._encode(update, work) if settings.arm == "coded" else None
        if self.seeded_local:
            save_local(work.memory, work.partition, get_local(self.model), work.server_round)
        new: Arrays | None = None
        if payload is None:
            new = {name: work.adapter[name] + change.numpy() for name, change in on_host(update).items()}
        done = Trained(
            adapter=new,
            payload=payload,
            num_examples=self._weight(work.partition),
            train_loss=loss,
            seconds_train=trained - start,
            seconds_encode=time.perf_counter() - trained,
            rank=limits.rank,
        )
        note(round_line(work.server_round, done))
        return done

    def evaluate(self, work: Work) -> Evaluated:
        """Loss of the global adapter on the partition's held-out windows. Nothing is trained, coded or counted.

        Raises:
            PrivacyError: the run, as it stands or as it began, protects the clients' data: a loss has no noise in it.
        """
        if self.settings.privacy.protects:
            raise PrivacyError("this run protects its clients' data: a loss is neither noised nor masked, and withheld")
        keep_terms(self.settings, work.memory, work.partition)
        Owner(work.memory.parent, self.max_epsilon).check(self.settings)
        try:
            work = self.resolved(work)
        except LacksError as error:
            return Evaluated.nothing(error.holds)
        assert work.adapter is not None
        start = time.perf_counter()
        torch.set_num_threads(self.settings.train.threads)
        set_adapter(self.model, {name: torch.from_numpy(array) for name, array in work.adapter.items()})
        self._take_local(work, work.server_round + 1)
        windows = self.shard(work.partition).heldout
        loss = heldout_loss(self.model, windows, self.settings.train.micro_batch_size)
        done = Evaluated(
            loss=loss if loss < MOST_LOSS else MOST_LOSS,  # of NaN, too
            tokens=windows.num_counted,
            windows=len(windows),
            seconds=time.perf_counter() - start,
        )
        note(f"after round {work.server_round}: held-out loss here {done.loss:.4f}")
        return done

    def resolved(self, work: Work) -> Work:
        """The same with its adapter in place of the broadcast that leads to it, which this client holds from now on.

        Raises:
            LacksError: the broadcast does not lead from what it holds, or from the run's start, to what it should.
        """
        if work.broadcast is None:
            return work
        layout = self.layout
        held = self.end.take_in(work.broadcast, _memory_of(work), layout.to_blocks(self.seeded))
        adapter = {name: tensor.numpy() for name, tensor in layout.tensors(held.adapter_RC)}
        return dataclasses.replace(
            work,
            adapter={name: adapter[name] for name in self.seeded},
            side=None if held.side is None else held.side.numpy(),
            broadcast=None,
        )

    def finetune(self, work: Work, team: Team) -> tuple[Adapter, float]:
        """The part of ``train`` that all of a team do: the update and the mean loss."""
        torch.set_num_threads(self.settings.train.threads)
        assert work.adapter is not None
        self.model.zero_grad()  # a message that failed within a step left its gradients
        adapter = {name: torch.from_numpy(array) for name, array in work.adapter.items()}
        self._take_local(work, work.server_round)
        windows, rounds = self.shard(work.partition).train, self.settings.federation.rounds
        training = for_round(self.settings.train, work.server_round, rounds)
        seed = training_seed(self.settings.seed, work.server_round, work.partition)
        rank = self._limits(work.partition).rank
        guard = self.guard(work.partition, work.memory)
        if guard is not None and self.settings.privacy.name == "record_dp":
            protection = dataclasses.replace(guard.protection(self._secret(work)), trained_rank=rank)
            return finetune_privately(self.model, adapter, windows, training, protection, seed, team)
        return finetune(self.model, adapter, windows, training, seed, team, rank)

    def _take_local(self, work: Work, server_round: int) -> None:
        """Puts the partition's own layers into the model, where another's may be, as they were before the round."""
        if self.seeded_local:
            set_local(self.model, load_local(work.memory, work.partition, self.seeded_local, server_round))

    def _limits(self, partition: int) -> ClientLimits:
        limits = limits_of(self.settings, partition, self.own_limits)
        return (
            limits if limits.rank is None or limits.rank < self.layout.rank else dataclasses.replace(limits, rank=None)
        )

    def _bits_now(self, limits: ClientLimits) -> float | None:
        """A parameter, of the next payload: no more than the line to the server bears; None: as the run says."""
        bits, layout = limits.bits if limits.bits is not None else self.settings.codec.bits, self.layout
        if self.line is None or bits is None:
            return limits.bits
        most = self.line.most_bits(layout.num_parameters_of(limits.rank or layout.rank))
        if most is None or most >= bits:
            return limits.bits
        note(f"its line bears {most:.3g} bits a parameter in {self.line.seconds:g} s")
        return most

    def _secret(self, work: Work) -> bytes:
        return secret_of(self.settings, work.server_round, work.partition, work.secret)

    def _weight(self, partition: int) -> int:
        """In the mean. How much data a client has is its secret, if all of them are; in a sum each counts alike."""
        if self.settings.privacy.name == "client_dp" or self.settings.privacy.secure_aggregation:
            return 1
        return num_examples(self.settings.train, len(self.shard(partition).train))

    def _encode(self, update: Adapter, work: Work) -> bytes:
        assert work.adapter is not None
        adapter = {name: torch.from_numpy(array) for name, array in work.adapter.items()}
        side = None if work.side is None else torch.from_numpy(work.side)
        limits = self._limits(work.partition)
        bits = self._bits_now(limits)
        place = Place(work.partition, work.server_round, side, work.accepted, bits, limits.rank)
        with codec_remedies(COPY_IT):
            if work.sum is None:
                return self.end.encode(update, _memory_of(work), place, self.codecs.at(adapter))
            terms = terms_of(self.settings, self.layout, work.sum.clients)
            public = PublicRound(work.server_round, terms, work.sum.announced)
            code = public.code(basis_at(self.codecs, adapter, self.layout, side), self.settings.run_id)
            residues = self.end.encode_for_sum(update, _memory_of(work), place, code, work.sum.identity)
            if terms.radius is not None:
                residues = with_noise(residues, self.settings, terms, self._secret(work))
            return code.pack(residues)  # not masked yet


def _memory_of(work: Work) -> DiskMemory:
    return DiskMemory(work.memory, work.partition)


def training_seed(seed: int, server_round: int, partition: int) -> int:
    """The same for the same run seed, round and partition, on every back end; at least 0 and less than 2**63."""
    sequence = np.random.SeedSequence([seed, server_round, partition])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def trainer_for(settings_json: str, overrides: Overrides) -> Trainer:
    """The trainer of these settings in this process, made at the first call.

    There is one at a time: the one before hands its model over, or frees its memory before anything is loaded.

    Args:
        settings_json: the run's settings, as the server sent them.
        overrides: this node's own paths, and whether it runs a model's own code.
    """
    global _current
    asked = (settings_json, overrides)
    if _current is None or _current[0] != asked:
        trainer = _new_trainer(settings_json, dict(overrides))  # settings that are refused leave the one before alone
        if _current is not None:
            compiled, keeps = _current[1].settings.model.compile, trainer.take_over(_current[1])
            _current = None
            if not keeps:
                if compiled:
                    torch.compiler.reset()  # its graphs hold on to it
                gc.collect()  # modules refer to each other in circles
            torch.cuda.empty_cache()
        _current = (asked, trainer)
    return _current[1]


_current: tuple[tuple[str, Overrides], Trainer] | None = None


def _wider_than_long(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """A factor whose shorter side is not its rank: in its blocks rows are something else."""
    ranks_first = {name: shape if ".lora_A." in name else shape[::-1] for name, shape in shapes.items()}
    return next((name for name, shape in ranks_first.items() if len(shape) == 2 and shape[0] > shape[1]), None)


def _own_limits(settings: Settings, own: dict[str, str]) -> ClientLimits:
    """What the node's owner gives. What a payload leaves out stays in the residual, and the server counts the client as
    any other: it tells nobody's rate from a payload, and rows that were not trained from what the reply says.

    Raises:
        ValueError: the run can have no such client.
    """
    bits, rank = own.get(MAX_BITS), own.get(MAX_RANK)
    limits = ClientLimits(None if bits is None else float(bits), None if rank is None else int(rank))
    if (seconds := own.get(UPLOAD_SECONDS)) is not None and (reason := refusal_of(settings, ClientLimits(bits=0.0))):
        raise ValueError(f"this node sends what its line takes in {seconds} s (--upload-seconds), and the run {reason}")
    for one, said in (
        (ClientLimits(bits=limits.bits), f"sends at most {bits} bits a parameter (--max-bits)"),
        (ClientLimits(rank=limits.rank), f"trains at most rank {rank} (--max-rank)"),
    ):
        if reason := refusal_of(settings, one):
            raise ValueError(f"this node {said}, and the run {reason}")
    return limits


def _new_trainer(settings_json: str, own: dict[str, str]) -> Trainer:
    settings = Settings.from_json(settings_json)
    if settings.model.trust_remote_code and not (own.get(TRUST) == "true" or os.environ.get(TRUST_VARIABLE)):
        raise ValueError(
            "the run wants model.trust_remote_code=true, which runs the model's own Python code on this node: start it "
            "with --trust-remote-code if its owner agrees"
        )
    model_path = own.get("model-path") or _in_this_checkout(settings.model.path)
    artifact = own.get("codec-artifact") or (settings.codec.artifact and _in_this_checkout(settings.codec.artifact))
    settings.model = dataclasses.replace(settings.model, path=model_path)
    settings.task = dataclasses.replace(settings.task, path=own.get("task-path", settings.task.path))
    settings.codec = dataclasses.replace(settings.codec, artifact=artifact)
    limits = _own_limits(settings, own)
    settings.strategy = StrategySettings()  # the server's alone: a node need not have what it names
    epsilon = own.get(MAX_EPSILON)
    line = Line(Path(own[LINE]), float(own[UPLOAD_SECONDS])) if LINE in own and UPLOAD_SECONDS in own else None
    return Trainer(settings, "task-path" in own, None if epsilon is None else float(epsilon), limits, line)


def _in_this_checkout(path: str) -> str:
    """The server's settings name what ships with the project by its path on the server: ``.../assets/tiny-llama``."""
    _, shipped, name = path.rpartition("/assets/")
    own = CHECKOUT / "assets" / name
    return str(own) if shipped and name and not Path(path).exists() and own.exists() else path


def _source_of(settings: Settings) -> tuple[object, ...]:
    """All that a loaded model depends on: with an equal one it need not be loaded again."""
    files = [file for file in sorted(Path(model_folder(settings.model)).glob("*")) if file.is_file()]
    dates = [(file.name, file.stat().st_mtime_ns) for file in files]
    moves = is_hub_name(settings.model.path) and settings.model.revision is None  # each run sees the hub's newest
    lora = dataclasses.replace(settings.lora, start=None)  # the server's alone
    return settings.model, lora, settings.seed, dates, settings.run_id if moves else ""
