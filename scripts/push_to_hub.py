"""Pushes a saved run to the Hub: weights, code, processor or tokenizer, metrics and the model card.

    python scripts/push_to_hub.py runs/digits --repo_id user/name

The token is the one of `hf auth login`, or of the environment variable `HF_TOKEN`; it is never written or printed.
"""

from __future__ import annotations

from pathlib import Path

from common.command import ArgumentParser, run_command
from training.hub import REFUSALS, explain, push


def main(arguments: list[str]):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of a saved run")
    parser.add_argument("--repo_id", required=True, help="user/name")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument("--revision", help="branch to push to, created if missing")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit_message", default="Upload a Translution model")
    args = parser.parse_args(arguments)
    if not args.directory.is_dir():
        raise FileNotFoundError(f"{args.directory} is no folder")
    print(push(args.directory, args.repo_id, args.private, args.revision, args.create_pr, args.commit_message))


if __name__ == "__main__":
    run_command(main, explain=explain, expected=REFUSALS)
