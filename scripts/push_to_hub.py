"""Pushes a saved run to the Hub: weights, code, processor or tokenizer, metrics and the model card.

    python scripts/push_to_hub.py runs/digits --repo_id user/name

The token is the one of `hf auth login`, or of the environment variable `HF_TOKEN`; it is never written or printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


try:
    from httpx2 import TransportError
except ImportError:
    # The Hub's client before version 2.
    from httpx import TransportError


# Only what is in the folder itself: checkpoints and optimizers lie deeper, or have other endings.
SHARED = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.txt", "*.png", "*.py")
PRIVATE = ("*/*", "trainer_state.json", "training_args.json", "arguments.json")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
ADVICE = {
    401: "the Hub does not accept the token: `hf auth login`, or set HF_TOKEN to one that may write",
    403: "the token may not write there: use one with write access to the repository",
    404: "there is no such repository or revision, or the token may not see it",
    409: "somebody else has changed the repository meanwhile: push again",
    412: "somebody else has changed the repository meanwhile: push again",
}


def push(
    directory: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, message: str, api: HfApi
) -> str:
    """Pushes a folder and returns the address of the commit or the pull request. The folder itself is only read.

    Raises:
        FileNotFoundError: if `directory` has no weights in safetensors.
        ValueError: if it has pickled weights.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    if not any((directory / name).is_file() for name in WEIGHTS):
        raise FileNotFoundError(f"{directory} has no {WEIGHTS[0]}: it is no saved run")
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{directory} has {', '.join(pickled)}: pickles run code when they are read; remove them first"
        )
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=list(SHARED),
        ignore_patterns=list(PRIVATE),
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    return commit.pr_url or commit.commit_url


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of a saved run")
    parser.add_argument("--repo_id", required=True, help="user/name")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument("--revision", help="branch to push to, made if it is not there")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit_message", default="Upload a Translution model")
    args = parser.parse_args(arguments)
    try:
        if not args.directory.is_dir():
            raise FileNotFoundError(f"{args.directory} is no folder")
        options = (args.private, args.revision, args.create_pr, args.commit_message, HfApi())
        print(push(args.directory, args.repo_id, *options))
    except HfHubHTTPError as error:
        # The Hub's own message may repeat headers; the status says enough.
        status = error.response.status_code if error.response is not None else None
        parser.exit(1, f"error: {ADVICE.get(status, f'the Hub answered {status}: try again later')}\n")
    except LocalTokenNotFoundError:
        parser.exit(1, f"error: there is no token: {ADVICE[401]}\n")
    except (TransportError, ConnectionError):
        parser.exit(1, "error: the Hub cannot be reached: check the network and HF_ENDPOINT, then push again\n")
    except (OSError, ValueError, HFValidationError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
