"""The contract over every codec that is registered here, a plug-in's too."""

from __future__ import annotations

import pytest
import torch

from gradcodec.artifact import Artifact, save_artifact
from gradcodec.contract import RULES, Candidate, determinism, digests_elsewhere, failure
from gradcodec.paper.networks import ARCHITECTURES
from gradcodec.registry import codec_names, entry_of
from gradcodec.settings import CodecSettings

NAMES = [
    name
    for name, entry in zip(codec_names(), map(entry_of, codec_names()), strict=True)
    if not entry.needs_artifact or entry.general_artifact is not None or name in ARCHITECTURES
]
CASES = [
    (name, rule)
    for name in NAMES
    for rule in RULES
    if name not in ARCHITECTURES or rule != "feedback"  # theirs are not trained here, and bring nothing
]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Candidate]:
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    for kind, network in ARCHITECTURES.items():
        settings = {"codec": {"layout": "", "literal": False}}
        save_artifact(Artifact(kind, network(False).state_dict(), settings), folder / kind)
    artifacts = {kind: str(folder / kind) for kind in ARCHITECTURES}
    return {name: Candidate(CodecSettings(name, artifact=artifacts.get(name))) for name in NAMES}


@pytest.fixture(scope="module")
def elsewhere(candidates: dict[str, Candidate]) -> dict[str, str]:
    """One fresh process for all: each takes seconds to start."""
    return dict(zip(candidates, digests_elsewhere(list(candidates.values())), strict=True))


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_codec_keeps_every_rule(
    name: str, rule: str, candidates: dict[str, Candidate], elsewhere: dict[str, str]
) -> None:
    if rule == "determinism":
        assert elsewhere[name], "every codec that is registered here can be built there"
        determinism(candidates[name], elsewhere[name])
    else:
        assert failure(RULES[rule], candidates[name]) is None
