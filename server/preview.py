"""What the clients of a task hold, and what one example looks like: to be seen before hours of training.

python -m server.preview task=dolly task.path=dolly.jsonl federation.num_clients=10 [key=value ...]

Reads the data, the tokenizer and the model's config.json; needs no weights and leaves no files.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from adapters.settings import check_training
from conf.arguments import run_program
from conf.checks import check_data
from conf.console import visible
from conf.schema import register_schemas, settings_of
from server.quiet import quiet
from tasks.settings import check_task, check_window

register_schemas()


@hydra.main(version_base="1.3", config_path="../conf", config_name="preview")
def main(config: DictConfig) -> None:
    quiet()
    try:
        settings = settings_of(config)
        check_task(settings.task)
        check_training(settings.train)
        check_data(settings.task)
        from adapters.base import check_vocabulary, load_tokenizer, max_positions  # slow, and not needed to refuse
        from server.holdings import example_text, holdings_of, holdings_table
        from tasks.shards import what_is_lost

        check_window(settings.task, max_positions(settings.model))
        tokenizer = load_tokenizer(settings.model)
        check_vocabulary(settings.model, tokenizer)
        holdings = holdings_of(settings, tokenizer)
    except ValueError as error:
        sys.exit(f"error: {visible(str(error))}")
    console = Console()
    console.print(holdings_table(settings, holdings))
    for warning in what_is_lost([holding.shard for holding in holdings], settings.task):
        console.print(Text(f"warning: {visible(warning)}", style="yellow"))
    console.print("\nOne example of client 0; what counts in the loss is green and in brackets:\n")
    console.print(example_text(holdings[0].shard.train, tokenizer))


if __name__ == "__main__":
    run_program(main, output=False)
