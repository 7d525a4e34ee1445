"""Secure aggregation: the sum is exact whoever drops out, and clients do what the argument for their privacy asks."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from secagg_cohort import RUN, Cohort, add, pack

from privacy.errors import PrivacyError
from privacy.secagg import (
    Invitation,
    KeyPair,
    Ledger,
    LostSumError,
    Opening,
    Party,
    Published,
    Request,
    smallest_sum,
    threshold_of,
    threshold_warning,
    traffic,
)
from privacy.secagg.ledger import MAX_ATTEMPTS
from privacy.secagg.masks import add_mask, check_of
from privacy.secagg.shares import combine, split


@pytest.mark.parametrize("clients", range(3, 13))
@pytest.mark.parametrize("gone", ["nobody", "before the reply", "before the answer", "before each"])
def test_the_sum_is_exact_to_the_integer(clients: int, gone: str) -> None:
    """30 % drop out where it says so, and everybody comes in any order."""
    order = random.Random(f"{clients} {gone}")
    threshold = threshold_of(clients, 0.4 if gone == "before each" else 0.5)
    cohort = Cohort(clients, threshold, modulus=order.choice([2, 101, 1 << 16, 3_000_000_001, 1 << 32]))
    present = list(cohort.partitions)
    order.shuffle(present)
    if gone in ("before the reply", "before each"):
        present = present[: len(present) - int(0.3 * len(present))]
    opening = cohort.opening(cohort.invite(), present)
    answering = list(present)
    order.shuffle(answering)
    if gone in ("before the answer", "before each"):
        answering = answering[: len(answering) - int(0.3 * len(answering))]
    for partition in answering:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    assert opening.summed == tuple(sorted(present))
    assert np.array_equal(opening.total(), cohort.expected(present))
    assert not opening.misfits


def test_too_few_messages_open_nothing_and_nobody_is_asked() -> None:
    cohort = Cohort(6)
    invitation = cohort.invite()
    opening = Opening(invitation)
    for partition in cohort.partitions[:3]:
        add(opening, partition, cohort.contribute(partition, invitation))
    with pytest.raises(LostSumError, match="3 masked messages came; a sum takes 4"):
        opening.close()


def test_too_few_answers_open_nothing() -> None:
    cohort = Cohort(6)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    for partition in cohort.partitions[:3]:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    assert not opening.can_open
    with pytest.raises(LostSumError, match="3 of 6 clients answered; it takes 4"):
        opening.total()


def test_a_sum_of_two_gives_the_other_away_and_is_not_opened_even_where_the_threshold_is_two() -> None:
    cohort = Cohort(3)
    assert cohort.threshold == 2
    opening = Opening(invitation := cohort.invite())
    messages = {partition: cohort.contribute(partition, invitation) for partition in cohort.partitions}
    for partition in cohort.partitions[:2]:
        add(opening, partition, messages[partition])
    with pytest.raises(LostSumError):
        opening.close()
    add(opening, cohort.partitions[2], messages[cohort.partitions[2]])
    request = opening.request(opening.close()[0])
    two = Request(invitation, request.summed[:2], request.sealed[:2])
    with pytest.raises(PrivacyError, match="a sum of 2 messages: it takes 3"):
        cohort.answer(0, two)


def test_clients_that_were_shown_different_invitations_have_masks_that_do_not_cancel() -> None:
    cohort = Cohort(4)
    invitation = cohort.invite()
    other = Invitation(
        RUN, 1, invitation.members, cohort.threshold + 1, cohort.modulus, cohort.length, invitation.nonce
    )
    assert invitation.digest != other.digest
    opening = Opening(invitation)
    for partition in cohort.partitions[:3]:
        add(opening, partition, cohort.contribute(partition, invitation))
    stray = cohort.contribute(cohort.partitions[3], other)
    with pytest.raises(PrivacyError, match="another attempt"):
        add(opening, cohort.partitions[3], stray)
    add(opening, cohort.partitions[3], stray[:2] + invitation.tag + stray[10:])  # a server that wants to
    opening.close()
    for partition in cohort.partitions[:3]:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    with pytest.raises(LostSumError):
        opening.total()


@pytest.mark.parametrize("clients", [3, 10, 17])
def test_bytes_are_as_documented(clients: int) -> None:
    cohort = Cohort(clients)
    invitation = cohort.invite()
    dropped = clients // 4
    present = cohort.partitions[dropped:]
    contribution = cohort.contribute(cohort.partitions[0], invitation)
    opening = cohort.opening(invitation, present) if dropped else None
    counted = traffic(clients, dropped, run_bytes=len(RUN))
    assert counted.published == len(invitation.members[0].pack())
    assert counted.invitation == len(invitation.pack())
    assert counted.contribution == len(contribution) - 4 * cohort.length
    if opening is not None:
        request = opening.request(present[0])
        assert counted.request == len(request.pack())
        assert counted.answer == len(cohort.answer(present[0], request))


def test_golden_bytes_of_version_1() -> None:
    """What both ends must derive alike, whatever their libraries."""
    keys = [KeyPair(bytes([number]) * 32) for number in (1, 2, 3)]
    members = tuple(pair.publish(RUN, partition) for partition, pair in enumerate(keys))
    invitation = Invitation(RUN, 5, members, 2, 1000, 4, bytes(range(16)))
    assert Invitation.unpack(invitation.pack()) == invitation
    one, other = (keys[a].channel(keys[b].public, invitation.digest).seed for a, b in ((0, 2), (2, 0)))
    mask = np.zeros(4, dtype=np.int64)
    add_mask(mask, one, 1, invitation)
    assert one == other
    assert (invitation.digest.hex(), one.hex(), check_of(one, invitation.digest).hex(), mask.tolist()) == GOLDEN


GOLDEN = (
    "6da47be95874d9c9027bc1a0b5196412b5e3e8a9c3a8031894036b3494938f1e",
    "3a17d0b2d622c753c36f4fc6740dd935",
    "6c62dddb9e69ab3b",
    [524, 694, 994, 622],
)


def test_a_threshold_of_shares_gives_the_secret_and_fewer_give_something_else() -> None:
    secret = bytes(range(16))
    shares = dict(enumerate(split(secret, 4, 7), start=1))
    for size in (3, 4):
        for chosen in itertools.combinations(shares, size):
            assert (combine({holder: shares[holder] for holder in chosen}) == secret) == (size == 4)


def test_the_library_needs_neither_torch_nor_flower() -> None:
    """So a client can answer in a process that starts at once."""
    program = "import sys, privacy.secagg; sys.exit(any(name in sys.modules for name in ('torch', 'flwr', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ---- what a client refuses


def test_a_client_refuses_what_belongs_to_another_run_or_round() -> None:
    cohort = Cohort(3)
    invitation = cohort.invite()
    party = cohort.party(0)
    with pytest.raises(PrivacyError, match="a sum of round 1 in round 2"):
        party.contribute(cohort.message(0), invitation, 2, pack)
    other = Party("another", 0, cohort.keys[0], Ledger())
    with pytest.raises(PrivacyError, match="invited to run 'run-7', in run 'another'"):
        other.contribute(cohort.message(0), invitation, 1, pack)
    assert not cohort.states, "nothing was noted"


def test_a_client_refuses_an_invitation_with_another_key_for_it_or_without_it() -> None:
    cohort = Cohort(4)
    invitation = cohort.invite()
    stranger = Party(RUN, 0, KeyPair.fresh(), Ledger())
    with pytest.raises(PrivacyError, match="another public key for this client"):
        stranger.contribute(cohort.message(0), invitation, 1, pack)
    with pytest.raises(PrivacyError, match="partition 0 was not invited"):
        cohort.party(0).contribute(cohort.message(0), cohort.invite(among=(3, 6, 9)), 1, pack)


def test_a_client_masks_once_in_a_context() -> None:
    cohort = Cohort(3)
    invitation = cohort.invite()
    cohort.contribute(0, invitation)
    with pytest.raises(PrivacyError, match="a nonce that was used"):
        cohort.contribute(0, invitation)
    with pytest.raises(PrivacyError, match="a nonce that was used"):
        cohort.contribute(0, cohort.invite(nonce=invitation.nonce, threshold=3))


def test_a_client_answers_once_in_a_round_whatever_is_said_to_have_dropped_out() -> None:
    cohort = Cohort(5)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    request = opening.request(0)
    cohort.answer(0, request)
    with pytest.raises(PrivacyError, match="answers once in a round"):
        cohort.answer(0, request)
    with pytest.raises(PrivacyError, match="answers once in a round"):
        cohort.answer(0, Request(request.invitation, request.summed[:3], request.sealed[:3]))
    with pytest.raises(PrivacyError, match="helped to open already"):
        cohort.contribute(0, cohort.invite())
    cohort.contribute(0, cohort.invite(2))
    with pytest.raises(PrivacyError, match="masked nothing"):
        cohort.answer(0, request)
    with pytest.raises(PrivacyError, match="it is over"):
        cohort.contribute(0, cohort.invite(1))


def test_a_client_answers_for_no_sum_but_one_that_holds_its_message() -> None:
    cohort = Cohort(5)
    invitation = cohort.invite()
    opening = cohort.opening(invitation, cohort.partitions[1:])
    request = opening.request(3)
    with pytest.raises(PrivacyError, match="lack this client's message"):
        cohort.answer(0, request)
    cohort.states.clear()
    with pytest.raises(PrivacyError, match="masked nothing"):
        cohort.answer(3, request)


def test_a_further_attempt_asks_some_of_the_same_clients_and_no_fewer_must_stay() -> None:
    cohort = Cohort(6)
    cohort.contribute(0, cohort.invite(among=cohort.partitions[:5], threshold=4))
    for among, threshold in ((cohort.partitions, 4), (cohort.partitions[:5], 3), ((0, 3, 15), 3)):
        with pytest.raises(PrivacyError, match="other clients or a lower threshold"):
            cohort.contribute(0, cohort.invite(among=among, threshold=threshold))
    cohort.contribute(0, cohort.invite(among=cohort.partitions[:4], threshold=4))
    with pytest.raises(PrivacyError, match="other clients"):
        cohort.contribute(0, cohort.invite(among=cohort.partitions[:5], threshold=4))


def test_a_further_attempt_is_opened_as_the_first_would_have_been() -> None:
    cohort = Cohort(6)
    cohort.opening(cohort.invite(), cohort.partitions)
    among = cohort.partitions[1:]
    opening = cohort.opening(cohort.invite(among=among), among)
    for partition in among[:4]:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    assert np.array_equal(opening.total(), cohort.expected(among))


def test_attempts_of_a_round_are_bounded() -> None:
    cohort = Cohort(3)
    for _ in range(MAX_ATTEMPTS):
        cohort.contribute(0, cohort.invite())
    with pytest.raises(PrivacyError, match="go on to the next round"):
        cohort.contribute(0, cohort.invite())


def test_what_is_answered_is_on_disk_before_it_is_said() -> None:
    cohort = Cohort(3)
    opening = cohort.opening(cohort.invite(), cohort.partitions)

    def fail(state: bytes) -> None:
        raise OSError("disk full")

    party = Party(RUN, 0, cohort.keys[0], Ledger(cohort.states[0], fail))
    with pytest.raises(OSError, match="disk full"):
        party.answer(opening.request(0))
    assert cohort.answer(0, opening.request(0)), "nothing was said, so it may still be"


@pytest.mark.parametrize("state", [b"{", b"[]", b"7", b'{"round": "x"}', b'{"unknown": 1}', b"\xff"])
def test_a_damaged_record_is_refused(state: bytes) -> None:
    with pytest.raises(PrivacyError, match="is damaged"):
        Ledger(state)


def test_keys_are_checked() -> None:
    with pytest.raises(PrivacyError, match="31 bytes"):
        KeyPair(bytes(31))
    with pytest.raises(PrivacyError, match="no X25519 key"):
        Published.unpack(Published(1, bytes(32)).pack())


# ---- thresholds


def opened_by_lies(clients: int, threshold: int, colluders: int) -> int:
    """The smallest set of honest clients whose sum some way to lie opens, by trying every way.

    Every honest client l is told a set that holds l and enough others; the server then has the self seed of i where
    a threshold of clients, colluders included, were told that i is in, and the seed of i and j as i dealt it where they
    were told that i is in and j is out.
    """
    least, honest = max(threshold, 3), range(clients - colluders)
    everyone = range(clients)
    choices = [
        [sum(1 << one for one in told) for size in range(least, clients + 1)
         for told in itertools.combinations(everyone, size) if client in told]
        for client in honest
    ]  # fmt: skip
    told = np.array(np.meshgrid(*choices, indexing="ij")).reshape(len(honest), -1)
    is_in = np.array([told >> one & 1 for one in honest], dtype=bool)  # [about, told to, way]
    own = is_in.sum(axis=1) + colluders >= threshold
    pair = np.array([[(is_in[i] & ~is_in[j]).sum(axis=0) + colluders >= threshold for j in honest] for i in honest])
    for size in range(1, len(honest) + 1):
        for chosen in itertools.combinations(honest, size):
            outside = [one for one in honest if one not in chosen]
            ways = own[list(chosen)].all(axis=0)
            for i, j in itertools.product(chosen, outside):
                ways &= pair[i, j] | pair[j, i]
            if ways.any():
                return size
    raise AssertionError("no way at all to open a sum")


@pytest.mark.parametrize(
    ("clients", "threshold", "colluders"), [(4, 3, 0), (5, 3, 0), (5, 4, 0), (5, 4, 1), (5, 3, 1), (4, 2, 0), (4, 4, 1)]
)
def test_no_way_to_lie_opens_fewer_than_is_claimed(clients: int, threshold: int, colluders: int) -> None:
    assert opened_by_lies(clients, threshold, colluders) >= smallest_sum(clients, threshold, colluders)


def test_a_low_threshold_does_open_single_clients_to_a_server_that_lies() -> None:
    assert opened_by_lies(5, 2, 0) == smallest_sum(5, 2) == 1
    assert "takes 3 to rule this out" in str(threshold_warning(5, 2))
    assert threshold_warning(5, 3) is None


def test_the_claims_that_the_page_makes() -> None:
    assert [smallest_sum(10, threshold) for threshold in (5, 6, 7, 8)] == [1, 4, 6, 8]
    assert smallest_sum(10, 6, colluders=2) == 1
    assert smallest_sum(10, 7, colluders=2) > 1
    assert smallest_sum(10, 6, colluders=2, lies=False) == 4
    assert smallest_sum(10, 3, colluders=3, lies=False) == 1


def test_thresholds_are_more_than_their_share() -> None:
    assert [threshold_of(clients) for clients in range(3, 9)] == [2, 3, 3, 4, 4, 5]
    assert [threshold_of(clients, 2 / 3) for clients in (3, 6, 9, 10)] == [3, 5, 7, 7]
    assert threshold_of(10, 0.0) == 2
