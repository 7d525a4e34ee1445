"""Federations with secure aggregation, on an in-process Grid over the real ClientApp."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcessGrid, apply_changes
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from scipy import stats
from test_federation import run, settings_for

from client.app import app as client_app
from client.sums import Member
from conf.checks import check_settings
from conf.schema import Settings
from gradcodec.linear import LinearCode
from gradcodec.residues import pack_residues, unpack_residues
from privacy.errors import PrivacyError
from privacy.secagg import Contribution, Invitation, Opening, Published, traffic
from server.federate import resumed
from server.host.keys import make_keys
from server.run.federation import run_federation
from strategies.folding import fold, unfold
from strategies.wire import CONFIG, PUBLISHED, UNMASK


def secure_settings(folder: Path, run: str, **changes: Any) -> Settings:
    settings = settings_for(folder, run, arm="coded")
    settings.codec.name, settings.codec.bits = "learned", 1.0
    settings.privacy.secure_aggregation = True
    settings.federation.num_clients, settings.federation.clients_per_round = 5, 5
    settings.federation.rounds = 2
    for key, value in changes.items():
        setattr(settings.privacy, key, value)
    return settings


class Dropping(InProcessGrid):
    """Of these partitions no answer comes: to the training, or to the request to open the sum."""

    trained: tuple[int, ...] = ()
    opened: tuple[int, ...] = ()

    def answer(self, message: Message) -> Message | None:
        partition = (message.metadata.dst_node_id - 1000) // 7
        kind = message.metadata.message_type
        gone = self.opened if kind == UNMASK else self.trained if kind == "train" else ()
        if partition in gone:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        return super().answer(message)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every opened sum beside the sum of what went in, unmasked, as the clients' trainers gave it."""
    given: dict[int, Any] = {}
    seen: list[tuple[Any, Any]] = []
    contribute, total = Member.contribute, Opening.total

    def watched(member: Member, residues: bytes, invitation: Any, least_stay: int) -> bytes:
        given[member._partition] = unpack_residues(residues, invitation.modulus, invitation.length)
        return contribute(member, residues, invitation, least_stay)

    def watched_total(opening: Opening) -> Any:
        found = total(opening)
        seen.append((found, sum(given[p] for p in opening.summed) % opening.invitation.modulus))
        return found

    monkeypatch.setattr(Member, "contribute", watched)
    monkeypatch.setattr(Opening, "total", watched_total)
    return seen


def test_the_sum_is_exact_and_training_goes_on(tmp_path: Path, sums: list[tuple[Any, Any]]) -> None:
    settings = secure_settings(tmp_path, "run")
    results = run(settings, tmp_path)
    assert len(sums) == 2
    for opened, true in sums:
        np.testing.assert_array_equal(opened, true)
    assert results.heldout_loss[-1] < results.heldout_loss[0]
    assert all(uplink.train_loss is None and uplink.update_norm == 0 for uplink in results.uplinks)
    assert results.privacy["secure_aggregation"] is True
    assert "the sum of a round's updates" in results.notes()["Privacy"][0]


@pytest.mark.parametrize(
    ("trained", "opened"), [((1,), ()), ((), (0, 3)), ((4,), (2,))], ids=["before", "between", "both"]
)
def test_drop_outs(
    tmp_path: Path, sums: list[tuple[Any, Any]], trained: tuple[int, ...], opened: tuple[int, ...]
) -> None:
    """Of five clients one or two are gone, at each step of the protocol."""

    class Gone(Dropping):
        pass

    Gone.trained, Gone.opened = trained, opened
    results = run(secure_settings(tmp_path, "run"), tmp_path, Gone)
    assert len(sums) == 2
    for found, true in sums:
        np.testing.assert_array_equal(found, true)
    assert len(results.uplinks) == 2 * (5 - len(trained))


def test_too_few_stay(tmp_path: Path) -> None:
    class Gone(Dropping):
        opened = (0, 1, 2)

    settings = secure_settings(tmp_path, "run")
    with pytest.raises(ValueError, match="2 of 5 clients answered; it takes 3: the sum stays masked"):
        run(settings, tmp_path, Gone)


def test_what_was_not_in_a_sum_goes_back_into_the_residual(tmp_path: Path) -> None:
    """A client whose reply is lost sends more next time: its first target is in the second."""
    targets: list[tuple[int, int, torch.Tensor]] = []
    true = LinearCode.encode

    def watched(code: LinearCode, blocks_RC: torch.Tensor, client: int) -> Any:
        targets.append((len(targets), client, blocks_RC.clone()))
        return true(code, blocks_RC, client)

    class Lost(Dropping):
        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            first = message.metadata.message_type == "train" and len(targets) <= 5
            partition = (message.metadata.dst_node_id - 1000) // 7
            if first and partition == 2:
                return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
            return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearCode, "encode", watched)
        settings = secure_settings(tmp_path, "run")
        run(settings, tmp_path, Lost)
    of_lost = [target for _, client, target in targets if client == 2]
    of_other = [target for _, client, target in targets if client == 1]
    inside = float((of_lost[1] * of_lost[0]).sum() / of_lost[0].square().sum())
    beside = float((of_other[1] * of_other[0]).sum() / of_other[0].square().sum())
    assert inside > beside + 0.2


def test_a_server_that_died_goes_on(tmp_path: Path, sums: list[tuple[Any, Any]]) -> None:
    """The resumed run takes new numbers for its sums, so that clients take part again."""

    class Dies(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if len(sums) == 1 and any(reply.metadata.message_type == UNMASK for reply in replies):
                raise KeyboardInterrupt
            return replies

    settings = secure_settings(tmp_path, "run")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, Dies)
    results = run(resumed(tmp_path / "run", []), tmp_path)
    assert len(results.heldout_loss) == 3
    assert json.loads((tmp_path / "run" / "privacy-ledger.json").read_text())["sums"] == 3


def test_noise_within_the_sum(tmp_path: Path, sums: list[tuple[Any, Any]]) -> None:
    settings = secure_settings(tmp_path, "run", name="client_dp", noise="sum", noise_multiplier=1.0, epsilon=None)
    settings.federation.min_replies, settings.privacy.clip = 4, 0.5
    results = run(settings, tmp_path)
    report = results.privacy
    assert report["epsilon"] is not None and report["releases_most"] == 2
    assert "a server that keeps to the protocol" in report["protects_from"]
    for found, true in sums:
        np.testing.assert_array_equal(found, true)


def test_messages_tell_nothing_apart(tmp_path: Path) -> None:
    """Every client's masked residues are uniform, whatever it sends: chi-square at 99.9 %, corrected for ten tests."""
    seen: list[Any] = []
    true = Opening.add

    def watched(opening: Opening, partition: int, contribution: Contribution, values: Any) -> None:
        seen.append((opening.invitation.modulus, np.array(values)))
        true(opening, partition, contribution, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Opening, "add", watched)
        run(secure_settings(tmp_path, "run"), tmp_path)
    assert len(seen) == 10
    for modulus, values in seen:
        counts = np.bincount(values, minlength=modulus)
        assert stats.chisquare(counts).pvalue > 0.001 / 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec__name": "rotated"}, "needs codec=learned"),
        ({"codec__bits": None}, "needs codec.bits=NUMBER"),
        ({"federation__clients_per_round": 2}, "needs federation.clients_per_round of at least 3"),
        ({"strategy__name": "fedmedian"}, "do not go together"),
        ({"privacy__secret_sampling": True}, "do not go together"),
    ],
)
def test_settings_that_cannot_be_served(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    settings = secure_settings(tmp_path, "run")
    apply_changes(settings, changes)
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_all_of_the_protocol_is_counted(tmp_path: Path) -> None:
    results = run(secure_settings(tmp_path, "run"), tmp_path)
    requests = [one for one in results.downlinks if one.step_bytes == 0]
    assert len(requests) == 10 and all(one.side_bytes > 0 for one in results.downlinks)
    assert all(one.payload_bytes > traffic(5).up for one in results.uplinks)


def test_keys_are_signed_and_checked(tmp_path: Path) -> None:
    """With the nodes' public keys at hand a client follows no invitation to others' keys."""
    make_keys(tmp_path / "keys", [], 3)
    members = []
    for partition in range(3):
        member = Member(tmp_path / f"memory-{partition}" / "run", "run", partition, tmp_path / "keys")
        members.append(Published.unpack(member.publish(tmp_path / "keys" / f"node-{partition}")))
    residues = Member(tmp_path / "memory-0" / "run", "run", 0, tmp_path / "keys")
    packed = pack_residues(np.zeros(10, np.int64), 13)
    assert residues.contribute(packed, Invitation("run", 1, tuple(members), 2, 13, 10), 2)
    forged = Published.unpack(Member(tmp_path / "forged" / "run", "run", 2).publish(tmp_path / "keys" / "node-1"))
    with pytest.raises(PrivacyError, match="the public key of partition 2 is not signed by its node"):
        residues.contribute(packed, Invitation("run", 2, (*members[:2], forged), 2, 13, 10), 2)
    with pytest.raises(PrivacyError, match=r"holds no node-<partition>\.pub"):
        Member(tmp_path / "memory-0" / "run", "run", 0, tmp_path).contribute(
            packed, Invitation("run", 3, tuple(members), 2, 13, 10), 2
        )
    with pytest.raises(PrivacyError, match="it takes 3, and more than half"):
        residues.contribute(packed, Invitation("run", 4, tuple(members), 2, 13, 10), 3)


def test_a_node_with_its_peers_keys_sends_nothing_unmasked(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory"), "peer-keys": str(tmp_path)})
    with pytest.raises(ValueError, match="takes part in masked sums alone"):
        run_federation(grid, settings_for(tmp_path, "open", arm="dense"))


def test_who_publishes_anothers_key_is_left_out(tmp_path: Path, sums: list[tuple[Any, Any]]) -> None:
    """And ends nobody's run: of five the two with the same key are refused."""

    class Copied(InProcessGrid):
        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            partition = (message.metadata.dst_node_id - 1000) // 7
            if partition == 4 and reply is not None and message.metadata.message_type == "query":
                stolen = Published.unpack(Member(tmp_path / "memory" / f"{tmp_path.name}-run", "run", 3).publish())
                forged = Published(4, stolen.public_key).pack()
                content = unfold(reply.content)
                content.config_records[CONFIG][PUBLISHED] = forged
                reply.content = fold(content)
            return reply

    settings = secure_settings(tmp_path, "run")
    settings.federation.rounds = 1
    results = run(settings, tmp_path, Copied)
    assert {fault.partition for fault in results.faults} == {3, 4}
    assert sorted(uplink.partition for uplink in results.uplinks) == [0, 1, 2]
    assert all(np.array_equal(found, true) for found, true in sums)
