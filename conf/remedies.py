"""What to do about the codec library's errors, which know neither settings nor commands: said by the programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradcodec.errors import ArtifactError, DivergedError


@contextmanager
def codec_remedies(for_artifact: str) -> Iterator[None]:
    """Adds to an error of the codec which setting or command mends it.

    Args:
        for_artifact: what to do where the trained codec is missing or serves another model.

    Raises:
        ArtifactError: with ``for_artifact`` behind it.
        DivergedError: with the key of the learning rate.
    """
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{error}: {for_artifact}") from None
    except DivergedError as error:
        raise DivergedError(f"{error} (lower train.lr)") from None


TRAIN_ONE = "train one with `python -m tgap`, with this model, rank and target modules"
COPY_IT = "copy the server's artifact to this node"
