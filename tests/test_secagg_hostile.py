"""Secure aggregation among strangers: what comes over the network parses or raises PrivacyError, wrong shares are
noticed and named, and keys that no node signed are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_cohort import RUN, Cohort, add, pack, unpack

from privacy.errors import PrivacyError
from privacy.secagg import Answer, Contribution, Invitation, KeyPair, LostSumError, Opening, Published, Request

COHORT = Cohort(4, length=5)
INVITATION = COHORT.invite()
CONTRIBUTION = COHORT.contribute(0, INVITATION)
OPENING = COHORT.opening(INVITATION, COHORT.partitions[1:])
REQUEST = OPENING.request(3)
ANSWER = COHORT.answer(3, REQUEST)

READERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "published": (Published.unpack, COHORT.keys[0].publish(RUN, 0).pack()),
    "invitation": (Invitation.unpack, INVITATION.pack()),
    "contribution": (lambda data: Contribution.unpack(data, INVITATION), CONTRIBUTION),
    "request": (Request.unpack, REQUEST.pack()),
    "answer": (lambda data: Answer.unpack(data, INVITATION, REQUEST.summed), ANSWER),
}
MASKED_BYTES = 4 * COHORT.length


@pytest.mark.parametrize("kind", READERS)
def test_readers_are_inverses(kind: str) -> None:
    read, data = READERS[kind]
    found = read(data)
    written = {
        Contribution: lambda: found.pack(INVITATION),  # type: ignore[attr-defined]
        Answer: lambda: found.pack(REQUEST),  # type: ignore[attr-defined]
    }.get(type(found), lambda: found.pack())()  # type: ignore[attr-defined]
    assert written == data


@pytest.mark.parametrize("kind", READERS)
@given(data=st.binary(max_size=400))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_bytes_parse_or_raise_privacy_error(kind: str, data: bytes) -> None:
    read, good = READERS[kind]
    for tried in (data, good[: len(data)] + data, good[:2] + data, good[:10] + data):
        try:
            read(tried)
        except PrivacyError:
            continue


@pytest.mark.parametrize("kind", READERS)
def test_every_truncation_is_noticed(kind: str) -> None:
    read, data = READERS[kind]
    fixed = len(data) - (MASKED_BYTES if kind == "contribution" else 0)  # what is masked may have any length
    for length in range(fixed):
        with pytest.raises(PrivacyError):
            read(data[:length])


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "contribution"])
def test_bytes_too_many_are_noticed(kind: str) -> None:
    read, data = READERS[kind]
    with pytest.raises(PrivacyError, match="too many"):
        read(data + b"\0")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("data", [None, "text", 7, bytearray(b"\x01A"), [1, 2]])
def test_what_is_no_bytes_is_noticed(kind: str, data: object) -> None:
    with pytest.raises(PrivacyError, match="instead of bytes"):
        READERS[kind][0](data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"among": (0, 3)}, "secure aggregation of 2 clients"),
        ({"among": (3, 0, 6)}, "ascending order"),
        ({"among": (0, 3, 3)}, "each stands there once"),
        ({"threshold": 1}, "threshold 1"),
        ({"threshold": 5}, "threshold 5"),
        ({"modulus": 1}, "1 as modulus"),
        ({"modulus": (1 << 32) + 1}, "as modulus"),
        ({"length": 0}, "0 as length"),
        ({"nonce": b"short"}, "5 as bytes of the nonce"),
        ({"number": -1}, "-1 as round"),
    ],
)
def test_an_invitation_that_nobody_may_follow_cannot_be_made(changed: dict[str, object], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        COHORT.invite(**changed)  # type: ignore[arg-type]


def test_two_clients_with_one_key_are_refused() -> None:
    members = (*INVITATION.members[:3], replace(INVITATION.members[3], public_key=INVITATION.members[0].public_key))
    with pytest.raises(PrivacyError, match="partitions 0 and 9 have the same public key"):
        replace(INVITATION, members=members)


def test_an_invitation_that_claims_more_members_than_are_served_is_refused_before_they_are_read() -> None:
    data = bytearray(INVITATION.pack())
    at = 2 + 1 + len(RUN) + 16 + 18
    data[at : at + 2] = b"\xff\xff"
    with pytest.raises(PrivacyError, match="65535 clients"):
        Invitation.unpack(bytes(data))


# ---- what the server refuses


def test_the_server_refuses_a_message_that_does_not_fit_and_counts_its_sender_as_gone() -> None:
    cohort = Cohort(5, modulus=101)
    invitation = cohort.invite()
    opening = Opening(invitation)
    contribution = Contribution.unpack(cohort.contribute(0, invitation), invitation)
    values = unpack(contribution.masked)
    wrong = [
        values[:-1],
        values.astype(float),
        values + np.uint32(101),
        values.astype(np.int64) - 101,
        None,
        values[None],
    ]
    for bad in wrong:
        with pytest.raises(PrivacyError, match="partition 0's masked message"):
            opening.add(0, contribution, bad)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="partition 1 was not invited"):
        opening.add(1, contribution, values)
    for partition in cohort.partitions[1:]:
        add(opening, partition, cohort.contribute(partition, invitation))
    with pytest.raises(PrivacyError, match="partition 3: a second masked message"):
        opening.add(3, contribution, values)
    opening.close()
    with pytest.raises(PrivacyError, match="partition 0: its masked message came after"):
        opening.add(0, contribution, values)
    for partition in opening.summed:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    assert np.array_equal(opening.total(), cohort.expected(cohort.partitions[1:]))


def test_the_server_refuses_answers_that_do_not_fit() -> None:
    cohort = Cohort(5)
    opening = cohort.opening(cohort.invite(), cohort.partitions[:4])
    answers = {partition: cohort.answer(partition, opening.request(partition)) for partition in opening.summed}
    earlier = ANSWER
    for bad, said in (
        (b"", "too soon"),
        (answers[0][:-1], "too soon"),
        (answers[0] + b"x", "too many"),
        (earlier, "made"),
    ):
        with pytest.raises(PrivacyError, match=f"partition 0: answer.*{said}"):
            opening.take(0, bad)
    with pytest.raises(PrivacyError, match="partition 12: an answer to a sum that it is not in"):
        opening.take(12, answers[0])
    for partition, answer in answers.items():
        opening.take(partition, answer)
    with pytest.raises(PrivacyError, match="partition 3: a second answer"):
        opening.take(3, answers[3])
    assert np.array_equal(opening.total(), cohort.expected(opening.summed))


def with_wrong_shares(answer: bytes) -> bytes:
    """The same answer with every share changed."""
    found = bytearray(answer)
    for place in range(len(found) - 16, 10, -16):
        found[place] ^= 1
    return bytes(found)


@pytest.mark.parametrize("liar", range(6))
def test_wrong_shares_of_one_client_are_noticed_and_named(liar: int) -> None:
    cohort = Cohort(7)
    opening = cohort.opening(cohort.invite(), cohort.partitions[:6])
    for place, partition in enumerate(opening.summed):
        answer = cohort.answer(partition, opening.request(partition))
        opening.take(partition, with_wrong_shares(answer) if place == liar else answer)
    assert np.array_equal(opening.total(), cohort.expected(opening.summed))
    first_tried = cohort.threshold
    assert {answered for answered, _ in opening.misfits} == ({opening.summed[liar]} if liar < first_tried else set())


def test_wrong_shares_without_any_to_spare_lose_the_sum_and_not_its_truth() -> None:
    cohort = Cohort(5)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    for partition in cohort.partitions[: cohort.threshold]:
        answer = cohort.answer(partition, opening.request(partition))
        opening.take(partition, with_wrong_shares(answer) if partition == 3 else answer)
    with pytest.raises(LostSumError, match="do not give its seed") as caught:
        opening.total()
    assert caught.value.suspects == (0,), "whose seed it was: who lied is not known"


def test_two_liars_among_ten_are_outvoted() -> None:
    cohort = Cohort(10)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    for place, partition in enumerate(cohort.partitions):
        answer = cohort.answer(partition, opening.request(partition))
        opening.take(partition, with_wrong_shares(answer) if place in (0, 5) else answer)
    assert np.array_equal(opening.total(), cohort.expected(cohort.partitions))


def test_a_dealer_of_wrong_shares_is_named() -> None:
    """It seals for everybody what does not belong together."""
    cohort = Cohort(5)
    invitation = cohort.invite()
    opening = Opening(invitation)
    for partition in cohort.partitions:
        contribution = Contribution.unpack(cohort.contribute(partition, invitation), invitation)
        values = unpack(contribution.masked)
        if partition == 6:
            wrong = (bytes([contribution.checks[2][0] ^ 1]) + contribution.checks[2][1:], *contribution.checks[3:])
            contribution = replace(contribution, checks=contribution.checks[:2] + wrong)
        opening.add(partition, contribution, values)
    opening.close()
    for partition in cohort.partitions:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    with pytest.raises(LostSumError, match="partition 6 dealt") as caught:
        opening.total()
    assert caught.value.suspects == (6,)


def damaged(sealed: bytes) -> bytes:
    return sealed[:20] + bytes([sealed[20] ^ 1]) + sealed[21:]


def test_shares_with_a_wrong_tag_are_left_out_and_the_others_answered() -> None:
    cohort = Cohort(5)
    invitation = cohort.invite()
    opening = Opening(invitation)
    for partition in cohort.partitions:
        contribution = Contribution.unpack(cohort.contribute(partition, invitation), invitation)
        values = unpack(contribution.masked)
        if partition == 6:  # damaged for two of five: three are enough
            sealed = contribution.sealed
            contribution = replace(contribution, sealed=(*map(damaged, sealed[:2]), *sealed[2:]))
        opening.add(partition, contribution, values)
    opening.close()
    for partition in cohort.partitions:
        answer = cohort.answer(partition, opening.request(partition))
        assert (6 in Answer.unpack(answer, invitation, opening.summed).shares) == (partition > 3)
        opening.take(partition, answer)
    assert np.array_equal(opening.total(), cohort.expected(cohort.partitions))


def test_shares_sealed_for_another_or_by_another_do_not_open() -> None:
    cohort = Cohort(4)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    for_another = opening.request(3)
    request = opening.request(0)
    swapped = (for_another.sealed[0], request.sealed[2], request.sealed[1], request.sealed[3])
    assert set(cohort.party(0).answer(replace(request, sealed=swapped)).shares) == {9}


# ---- signatures

NODE_KEYS = {partition: ec.generate_private_key(ec.SECP384R1()) for partition in range(0, 12, 3)}
TRUSTED = {partition: key.public_key() for partition, key in NODE_KEYS.items()}


def signed_invitation(cohort: Cohort) -> Invitation:
    members = tuple(cohort.keys[one].publish(RUN, one, NODE_KEYS[one]) for one in cohort.partitions)
    return Invitation(RUN, 1, members, cohort.threshold, cohort.modulus, cohort.length)


def test_signed_keys_are_taken_and_survive_the_wire() -> None:
    cohort = Cohort(4, trusted=TRUSTED)
    invitation = Invitation.unpack(signed_invitation(cohort).pack())
    assert all(0 < len(member.signature) <= 104 for member in invitation.members)
    opening = cohort.opening(invitation, cohort.partitions)
    for partition in cohort.partitions[1:]:
        opening.take(partition, cohort.answer(partition, opening.request(partition)))
    assert np.array_equal(opening.total(), cohort.expected(cohort.partitions))


@pytest.mark.parametrize(
    "forged",
    [
        replace(KeyPair.fresh().publish(RUN, 6), signature=b""),
        KeyPair.fresh().publish(RUN, 6),
        KeyPair.fresh().publish(RUN, 6, NODE_KEYS[3]),
        KeyPair.fresh().publish("run-6", 6, NODE_KEYS[6]),
        replace(KeyPair.fresh().publish(RUN, 5, NODE_KEYS[6]), partition=6),
        replace(KeyPair.fresh().publish(RUN, 6, NODE_KEYS[6]), public_key=KeyPair.fresh().public),
        replace(KeyPair.fresh().publish(RUN, 6), signature=b"no DER"),
    ],
    ids=["none", "unsigned", "another node's", "another run's", "another partition's", "another key's", "garbage"],
)
def test_a_key_that_its_node_did_not_sign_is_refused(forged: Published) -> None:
    cohort = Cohort(4, trusted=TRUSTED)
    invitation = signed_invitation(cohort)
    members = (*invitation.members[:2], forged, *invitation.members[3:])
    with pytest.raises(PrivacyError, match="partition 6 is not signed by its node"):
        cohort.contribute(0, replace(invitation, members=members))


def test_a_member_without_a_trusted_node_key_is_refused() -> None:
    cohort = Cohort(4, trusted={partition: key for partition, key in TRUSTED.items() if partition != 9})
    with pytest.raises(PrivacyError, match="partition 9 has no trusted node key"):
        cohort.contribute(0, signed_invitation(cohort))


def test_a_client_masks_no_message_that_does_not_fit() -> None:
    cohort = Cohort(3, modulus=101)
    for bad in (cohort.message(0)[1:], cohort.message(0) + 101, cohort.message(0) - 101, cohort.message(0) / 2):
        with pytest.raises(PrivacyError, match="the message to mask"):
            cohort.party(0).contribute(bad, cohort.invite(), 1, pack)
    assert not cohort.states, "nothing was noted"


def test_a_client_s_own_sealed_shares_do_not_come_back_to_it_as_another_s() -> None:
    """Client 0's shares for client 3 say nothing to client 0; a server may not have it open them all the same."""
    cohort = Cohort(4)
    opening = cohort.opening(cohort.invite(), cohort.partitions)
    request = opening.request(0)
    its_own = opening.request(3).sealed[0]
    reflected = replace(request, sealed=(request.sealed[0], its_own, *request.sealed[2:]))
    assert set(cohort.party(0).answer(reflected).shares) == {0, 6, 9}
