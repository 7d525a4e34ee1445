"""A run's adapter for others: a PEFT directory, or the base model with the adapter merged in.

python -m server.export outputs/federate/2026-01-31/12-00-00 --output DIR            # adapter and model card
python -m server.export outputs/federate/2026-01-31/12-00-00 --output DIR --merged   # a whole model, with tokenizer
python -m server.export RUN --output DIR --set model.path=Qwen/Qwen2.5-1.5B          # the base model as others name it

RUN_OR_ADAPTER is a run's output folder, or any PEFT directory of LoRA, rsLoRA or DoRA. Merged weights have the dtype
of the run's base weights (model.dtype); float32 keeps the adapter's effect whole, bfloat16 rounds small changes away. A
run on a quantised base is merged into the unquantised one, --set model.quantization=none: near what was trained, not
it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapters.text import one_line
from conf.output import open_output
from server.quiet import quiet
from server.records.places import adapter_folder


def main() -> None:
    """The program: ends with one line that says what was written, or what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m server.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="a run's output folder or a PEFT adapter directory")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    parser.add_argument("--merged", action="store_true", help="the base model with the adapter merged in")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: model.path, model.dtype ..."
    )
    args = parser.parse_args()
    quiet()
    try:
        export(args.adapter, args.output, args.merged, args.set)
    except ValueError as error:
        sys.exit(f"error: {one_line(error, 2000)}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print(f"{'merged model' if args.merged else 'adapter'} in {args.output}")


def export(path: str, output: Path, merged: bool, overrides: list[str]) -> None:
    """Writes the adapter of a run or a PEFT directory, or its merged model, into ``output``.

    Raises:
        ValueError: something is missing or does not fit, or ``output`` holds files already.
    """
    adapter_folder(path)  # what is missing is refused before anything slow is loaded
    from adapters.base import load_config, load_tokenizer  # slow to import, and not needed for --help
    from adapters.export import beyond_vllm, save_adapter, save_merged, served_by_vllm
    from adapters.gguf import model_folder
    from server.records.trained import read_trained

    trained = read_trained(path, overrides)
    if any(open_output(output).iterdir()):
        raise ValueError(f"--output {output} holds files already: give an empty or new folder")
    facts, notes = (trained.results.facts(), trained.results.notes()) if trained.results is not None else ({}, {})
    if merged:
        save_merged(trained.load_model(), load_tokenizer(trained.settings.model), facts, output, notes)
    else:
        try:
            trained.config.base_model_name_or_path = model_folder(trained.settings.model)
            tokenizer, config = load_tokenizer(trained.settings.model), load_config(trained.settings.model)
        except ValueError as error:
            print(f"no tokenizer is written beside the adapter: {one_line(error)}", file=sys.stderr)
            save_adapter(trained.adapter, trained.config, facts, output, sections=notes)
            return
        by_vllm = served_by_vllm(config, trained.adapter)
        why = beyond_vllm(trained.settings.lora) or ("" if by_vllm else "its names are those of the text part alone")
        if why:
            print(f"vLLM does not apply this adapter: {why}: use --merged for it", file=sys.stderr)
        save_adapter(trained.adapter, trained.config, facts, output, tokenizer, by_vllm, notes)


if __name__ == "__main__":
    main()
