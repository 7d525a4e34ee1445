"""Central evaluation: the global adapter's loss on the held-out windows of all clients."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import check_vocabulary, load_tokenizer, max_positions, resolve_device
from adapters.finetune import DivergedError, finetune
from adapters.footprint import check_fits, estimate_memory, free_bytes
from adapters.model import Adapter, load_model, on_host, set_adapter
from adapters.settings import for_evaluation, for_round
from adapters.windows import Windows
from conf.footprint import server_memory
from conf.schema import Settings
from server.run.outline import Outline
from strategies.errors import RoundError
from tasks.settings import check_window
from tasks.shards import Shard, load_shards, what_is_lost
from tasks.windows import heldout_loss

GIVES_WAY = 10
"""Nice levels: a tenth of a core where others want all of it."""
_LOG = logging.getLogger(__name__)


class Evaluator(Outline):
    """Base model, every client's shard and the initial adapter, on the server's side.

    Raises:
        ValueError: the server cannot read the task's text or has too little memory, or ``lora.start`` does not fit.
    """

    def __init__(self, settings: Settings) -> None:
        check_window(settings.task, max_positions(settings.model))
        self.tokenizer = tokenizer = load_tokenizer(settings.model)
        check_vocabulary(settings.model, tokenizer)
        num_clients = settings.federation.num_clients
        self.shards: list[Shard] = list(load_shards(settings.task, tokenizer, range(num_clients), num_clients))
        for warning in what_is_lost(self.shards, settings.task):
            _LOG.warning(warning)
        self.heldout = Windows.cat([shard.heldout for shard in self.shards])
        check_fits(server_memory(settings), resolve_device(settings.model), training=settings.arm == "centralised")
        super().__init__(settings)
        # the clients of a simulation work on the same cores, and a round waits for them alone
        self._gives_way = settings.backend.name == "simulation" and self.model.device.type == "cpu"
        self.batch_size = settings.train.micro_batch_size  # what fits into memory in training fits here

    def _load(self, settings: Settings) -> PeftModel:
        model_settings = settings.model if settings.arm == "centralised" else for_evaluation(settings.model)
        return load_model(model_settings, settings.lora, settings.seed)

    def loss(self, adapter: Mapping[str, Tensor]) -> float:
        """Held-out loss in nats per token."""
        set_adapter(self.model, adapter)
        return _giving_way(self.loss_as_it_is) if self._gives_way else self.loss_as_it_is()

    def loss_as_it_is(self) -> float:
        """The same, with the adapter that is in the model."""
        return heldout_loss(self.model, self.heldout, self.batch_size)

    def rehearse(self, settings: Settings, steps: int) -> Adapter | None:
        """The update of so many training steps on held-out text, one window each: it lies in the directions in which
        the clients' first updates will lie. None: there is no memory for it here, or it diverged, as theirs will."""
        model = for_evaluation(settings.model)
        train = for_round(settings.train, 1, settings.federation.rounds)
        train = replace(train, steps=steps, epochs=None, warmup_steps=0, batch_size=1, micro_batch_size=1)
        needed = estimate_memory(model, settings.lora, train, settings.task.window)
        free = free_bytes(resolve_device(model))
        if free is not None and needed.total - needed.weights > free:
            _LOG.warning("no memory here for federation.rehearsal_steps=%d: round 1 is coded without them", steps)
            return None
        try:
            return on_host(finetune(self.model, self.initial, self.heldout, train, settings.seed)[0])
        except DivergedError:
            return None

    def root_update(self, settings: Settings, server_round: int, adapter: Mapping[str, Tensor]) -> Adapter:
        """What a client's training would change of the adapter on the server's held-out text: what FLTrust judges the
        clients by (Cao et al. 2021). So that text decides on weights, and its loss is no longer quite held out.

        Raises:
            RoundError: it diverged.
        """
        seed = settings.seed + server_round
        train = for_round(settings.train, server_round, settings.federation.rounds)
        try:
            return on_host(finetune(self.model, adapter, self.heldout, train, seed)[0])
        except DivergedError as error:
            raise RoundError(f"round {server_round}: the server's own update: {error}") from None


def _giving_way(work: Callable[[], float]) -> float:
    """On what other processes leave of the cores. In a thread of its own: niceness can be taken, but not given back."""
    done: Future[float] = Future()
    num_threads = torch.get_num_threads()

    def run() -> None:
        try:
            torch.set_num_threads(num_threads)  # every thread has its own number
            if sys.platform == "linux":
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + GIVES_WAY, 19))
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # at Ctrl-C nobody waits for it
    return done.result()
