"""Pushes saved runs to the Hub in one commit, and puts the Hub's refusals in words."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from common.command import EXPECTED
from common.saved_files import CARD, LICENSES, RUN, WEIGHTS, WEIGHTS_INDEX, check_readable, shards
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from training.checkpoints import TRAINER_STATE, UNAVERAGED
from training.model_card import model_card


try:
    from httpx2 import TransportError
except ImportError:
    # The Hub's client before version 2.
    from httpx import TransportError


# The model and its documentation. Checkpoints and what only a resumed run needs are not pushed.
SHARED = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.txt", "*.png", "*.py", LICENSES)
PRIVATE = ("*/*", ".*", TRAINER_STATE, UNAVERAGED, "training_args.json", "arguments.json")
# Weights that run code when they are loaded.
PICKLED = ("pytorch_model*.bin", "adapter_model*.bin", "*.ckpt", "*.pkl")
# Names that `from_pretrained` looks for. Old ones beside a push could be loaded in its place.
LOADED = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    WEIGHTS_INDEX,
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
)
# Errors of the Hub's client, in addition to those that every script expects.
REFUSALS = (*EXPECTED, RuntimeError, TransportError)
FULL = "there is no space left for it: free some, or choose another place, then push again"
ADVICE = {
    401: "the Hub does not accept the token, or shows the repository to others only: `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: use one with write access to the repository",
    404: "there is no such repository or revision, or the token may not see it",
    409: "somebody else has changed the repository meanwhile: push again",
    412: "somebody else has changed the repository meanwhile: push again",
    413: "a file is larger than the Hub takes: save the weights in shards (`max_shard_size`)",
    507: FULL,
}


def check_weights(directory: Path) -> None:
    """Checks that a folder holds complete weights in safetensors, and no others.

    Raises:
        FileNotFoundError: if weights, or a shard that the index names, are missing.
        ValueError: if there are pickled weights, or weights or the index are damaged.
    """
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory} has {', '.join(pickled)}: pickled weights run code when they are read; save them as safetensors"
        )
    if (directory / WEIGHTS_INDEX).is_file():
        missing = [shard for shard in shards(directory) if not (directory / shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} has no {', '.join(missing)}, which {WEIGHTS_INDEX} names")
    elif not any((directory / name).is_file() for name in WEIGHTS):
        raise FileNotFoundError(f"{directory} has no {WEIGHTS[0]}: it is no saved run")
    for path in sorted(directory.glob("*.safetensors")):
        check_readable(path)


def additions(directory: Path, repo_id: str) -> Iterator[CommitOperationAdd]:
    """The files to push, with a card for the name of the repository."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    for name in filter_repo_objects(names, allow_patterns=list(SHARED), ignore_patterns=list(PRIVATE)):
        if name != CARD or not (directory / RUN).is_file():
            yield CommitOperationAdd(name, directory / name)
    if (directory / RUN).is_file():
        yield CommitOperationAdd(CARD, str(model_card(directory, repo_id)).encode())


def deletions(there: Iterable[str], pushed: Iterable[str]) -> Iterator[CommitOperationDelete]:
    """Weights and indexes of an earlier push that this one does not replace."""
    for name in sorted(set(there) - set(pushed)):
        if any(fnmatchcase(name, pattern) for pattern in LOADED) and "/" not in name:
            yield CommitOperationDelete(name, is_folder=False)


def push(
    directory: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload a Translution model",
    api: HfApi | None = None,
) -> str:
    """Pushes a folder in one commit, and returns the URL of the commit or of the pull request. The folder is not changed.

    The same commit deletes earlier weights that would be loaded in place of these; all else in the repository stays.

    Args:
        directory: a saved run.
        repo_id: `user/name`; made if it is not there.
        private: whether a new repository is private.
        revision: branch to push to, or to open a pull request against; made if it is not there.
        create_pr: whether to open a pull request.
        message: of the commit.
        api: the Hub's client.

    Raises:
        FileNotFoundError, ValueError: see `check_weights`.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    api = api or HfApi()
    check_weights(directory)
    # Errors of the card are raised before the repository is created.
    list(additions(directory, repo_id))
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # The upload may take long. `parent_commit` makes it fail if somebody else pushes meanwhile.
    before = api.model_info(repo_id, revision=revision)
    added = list(additions(directory, repo_id))
    there = [file.rfilename for file in before.siblings or ()]
    commit = api.create_commit(
        repo_id,
        [*added, *deletions(there, [operation.path_in_repo for operation in added])],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=before.sha,
    )
    return commit.pr_url or commit.commit_url


def explain(error: BaseException) -> str:
    """What to do about an error. The Hub's own message, which may repeat a request's headers, is left out."""
    # The upload of a large file wraps the actual error.
    if isinstance(error.__cause__, HfHubHTTPError | TransportError | OSError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status is None or status == 429 or status >= 500:
            otherwise = "try again later"
        else:
            otherwise = "it refuses what it was sent, and will again; check the names, the card and the Hub's client"
        return ADVICE.get(status, f"the Hub answered {status}: {otherwise}")
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: `hf auth login`, or set HF_TOKEN"
    if isinstance(error, TransportError | ConnectionError):
        return "the Hub cannot be reached: check the network and HF_ENDPOINT, then push again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    return str(error)
