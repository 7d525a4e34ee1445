"""One whole federated run, composed by Hydra.

python -m server.federate [arm=coded|dense|centralised|base] [codec=learned|identity|rotated|...] [key=value ...]
python -m server.federate -m codec=learned,identity seed=0,1        # a sweep
python -m server.federate backend=superlink                          # on a running SuperLink, over gRPC
python -m server.federate --cfg job                                  # every setting and its value
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf.output import open_output
from conf.schema import Settings, check_settings, register_schemas, settings_of
from server.quiet import quiet
from server.results import RunResults

register_schemas()


@hydra.main(version_base="1.3", config_path="../conf", config_name="federate")
def main(config: DictConfig) -> float:
    """Returns the final held-out loss, for Hydra's sweepers."""
    quiet()
    try:
        settings = settings_of(config)
        settings.run_id = uuid.uuid4().hex[:12]
        results = run(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    losses = results.heldout_loss
    print(
        f"{settings.arm}: held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
        f"{results.payload_bytes_per_client_round:.0f} payload bytes a client and round, "
        f"{results.seconds:.0f} s, results in {settings.output}"
    )
    return losses[-1]


def run(settings: Settings) -> RunResults:
    """Runs one arm on the back end of the settings. Raises ValueError: it cannot run as asked for."""
    check_settings(settings)
    open_output(Path(settings.output))
    if settings.arm in ("base", "centralised"):
        from server.centralised import run_alone

        return run_alone(settings)
    if settings.backend.name == "simulation":
        from server.simulation import run_in_simulation

        return run_in_simulation(settings)
    from server.superlink import run_on_superlink

    return run_on_superlink(settings)


if __name__ == "__main__":
    main()
