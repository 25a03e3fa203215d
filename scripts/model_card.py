"""Writes the model card of a saved run from its `config.json` and `run.json`.

python scripts/model_card.py runs/digits
"""

from __future__ import annotations

from pathlib import Path

from common.command import ArgumentParser, run_command
from training.model_card import write_model_card


def main(arguments: list[str]):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of a saved run")
    args = parser.parse_args(arguments)
    print(write_model_card(args.directory))


if __name__ == "__main__":
    run_command(main)
