"""What a server's messages meet when the SuperLink dies under them: Flower's own state in SQLite, no network."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from strategies.messages import replies_to


class ForgetfulSuperLink:
    """Its first ``lost`` answers to a stored object never arrive: Flower sends the object again, as after a restart."""

    def __init__(self, state: SqlLinkState, task: Any, lost: int) -> None:
        self.state, self.task, self.lost = state, task, lost
        self.pushes = 0
        self._one_at_a_time = threading.Lock()  # Flower pushes from several threads

    def PushMessages(self, request: Any) -> Any:
        self.pushes += 1
        return runtime_handlers.push_messages(request, self.state, self.task)

    def PushObject(self, request: Any) -> Any:
        with self._one_at_a_time:
            answer = runtime_handlers.push_object(request, self.state, self.task)
            if self.lost and answer.stored:
                self.lost -= 1
                answer = runtime_handlers.push_object(request, self.state, self.task)
            return answer


def pushed(folder: Path, lost: int) -> tuple[ForgetfulSuperLink, list[Message]]:
    database = str(folder / "state.db")
    state = SqlLinkState(database, NoOpFederationManager(), ObjectStoreFactory(database).store())
    state.initialize()
    node = state.create_node("owner", "owner", b"key", 30.0)
    assert state.activate_node(node, 30.0)
    run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    superlink = ForgetfulSuperLink(state, SimpleNamespace(run_id=run_id), lost)
    grid = HttpGrid(token="token")
    grid._run = cast(Any, SimpleNamespace(run_id=run_id))
    grid._client = cast(Any, superlink)
    content = RecordDict(
        {"arrays": ArrayRecord({str(i): Array(np.full(9999, i, np.float32)) for i in range(5)})}
    )  # too large to be folded
    message = Message(content, node, MessageType.TRAIN)
    message.metadata.__dict__.update(_run_id=run_id, _src_node_id=1)
    replies_to(grid, [message], seconds=0)
    return superlink, state.get_message_ins(node, limit=None)


def test_a_superlink_that_dies_while_it_stores_an_object_is_sent_the_rest(tmp_path: Path) -> None:
    superlink, messages = pushed(tmp_path, lost=1)
    assert superlink.pushes == 2
    assert len(messages) == 1, "the node would train twice"
    store = superlink.state.object_store
    tree = store.get_object_tree(messages[0].metadata.message_id)

    def contents(one: Any) -> list[bytes | None]:
        return [store.get(one.object_id), *(content for child in one.children for content in contents(child))]

    assert len(stored := contents(tree)) >= 5
    assert all(stored), "an object is missing"


def test_a_superlink_that_never_says_so_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ObjectPushError):
        pushed(tmp_path, lost=1000)
