"""The back end ``inprocess``: clients take their turns in this process, so that a run needs no engine and no start.

For a notebook, a debugger, one GPU, or a machine without Ray. Every client has its own data and memory; they share one
loaded model, as the clients of one node do.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from conf.schema import Settings
from server.backends.local import clients_here
from server.records.events import EventLog
from server.records.results import RunResults
from server.run.federation import run_federation
from strategies.wire import PARTITION


def run_in_process(settings: Settings) -> RunResults:
    """Runs all rounds, the clients of each one after another.

    Raises:
        ValueError: as ``run_federation`` does.
        KeyboardInterrupt: the user ended it; the run's log says so.
    """
    output = Path(settings.output)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # else no message can be made
    client_app = clients_here(settings)
    with InProcessGrid(client_app, settings.federation.num_clients) as grid:
        try:
            return run_federation(grid, settings)
        except KeyboardInterrupt:
            EventLog(output, keep=True).write("run_stopped")
            raise


class InProcessGrid(Grid):
    """Flower's Grid over a ClientApp of this process: one context a client, and one thread for all of them."""

    def __init__(self, app: ClientApp, num_clients: int, node_config: dict[str, Any] | None = None) -> None:
        """``node_config``: what every node says of itself, beside its partition."""
        self.app = app
        self.contexts = {
            1000 + 7 * i: Context(
                run_id=1,
                node_id=1000 + 7 * i,
                node_config=UserConfig({PARTITION: i, "num-partitions": num_clients, **(node_config or {})}),
                state=RecordDict(),
                run_config=UserConfig(),
            )
            for i in range(num_clients)
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clients")
        self._replies: dict[str, Future[Message | None]] = {}
        self._num_sent = 0

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identity = f"message-{self._num_sent}"
            message.metadata.__dict__["_message_id"] = identity  # as Flower's own grids do
            self._num_sent += 1
            self._replies[identity] = self._thread.submit(self.answer, message)
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Those that are ready."""
        ready = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        replies = [self._replies.pop(i).result() for i in ready]
        return [reply for reply in replies if reply is not None]

    def answer(self, message: Message) -> Message | None:
        """The ClientApp's reply; as on a node, what it raises is an error reply. None: it is lost."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not used: it collects a round's replies in a list")

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    run = property(lambda self: None)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used")

    def get_nodes(self) -> Any:
        raise AssertionError("not used")
