"""A finished run or a PEFT adapter directory, as the programs that come after training take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft import LoraConfig, PeftModel

from adapters.export import load_adapter, lora_settings
from adapters.model import Adapter, load_model, set_adapter
from adapters.settings import ModelSettings, for_evaluation
from conf.schema import Settings, changed
from server.records.places import adapter_folder
from server.records.results import RunResults, read_results


@dataclass(frozen=True)
class TrainedAdapter:
    """One adapter, and what is known of the run that it came from."""

    name: str
    path: str  # as it was given
    config: LoraConfig
    adapter: Adapter
    settings: Settings  # those of the run; of an adapter alone the defaults, with its base model and its LoRA
    results: RunResults | None

    def load_model(self) -> PeftModel:
        """The base model with this adapter in it. Raises ValueError: they do not fit."""
        model = load_model(for_evaluation(self.settings.model), self.settings.lora, self.settings.seed)
        try:
            set_adapter(model, self.adapter)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return model


def read_trained(path: str, overrides: Sequence[str] = ()) -> TrainedAdapter:
    """The adapter in a run's output folder or in a PEFT adapter directory; loads no model.

    Args:
        path: of the folder.
        overrides: ``key=value`` changes to its settings, such as ``model.path=...``.

    Raises:
        ValueError: neither is there, a file is broken, or an override names no setting.
    """
    folder = adapter_folder(path)
    run = folder.parent if folder.name == "adapter" else None
    config, adapter = load_adapter(folder)
    results = read_results(run) if run is not None and (run / "results.json").is_file() else None
    base = ModelSettings(path=str(config.base_model_name_or_path))
    settings = results.settings if results is not None else Settings(model=base)
    settings.model = replace(settings.model, trust_remote_code=False)  # whose folder it is may not say so: --set does
    settings = changed(replace(settings, lora=lora_settings(config)), overrides)
    name = results.settings.arm if results is not None else "adapter"
    return TrainedAdapter(name, path, config, adapter, settings, results)
