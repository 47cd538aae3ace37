"""What huggingface_hub says, in lowbit's words: errors as one sentence with a remedy, and none of its own lines beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.near import near_names

_ABSENT = "is no local folder and not in the local cache, and Hugging Face cannot be reached"
# By the status of an answer: what it means, and what to do.
_ANSWERS = {
    401: ("it does not take your token", "run `hf auth login` again, or unset HF_TOKEN"),
    403: ("your token has no right to it", "run `hf auth login` with a token that may read it"),
    429: ("it has had too many requests from here", "wait some minutes, or run `hf auth login`"),
}


@contextmanager
def without_their_words() -> Iterator[None]:
    """Warnings that huggingface_hub logs, such as of retries and of requests without a token, stay unsaid inside.

    Errors and bars of downloads show; the level is what it was afterwards.
    """
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def explained(repo: str, error: Exception) -> SourceError:
    """An error of huggingface_hub as a SourceError that says what to do."""
    problem, remedy = _problem(repo, error)
    near = near_names(repo)
    return SourceError(f"{repo} {problem}{near or f'; {remedy}'}")


def _problem(repo: str, error: Exception) -> tuple[str, str]:
    """What is wrong and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated", f"accept its terms at https://huggingface.co/{repo} and run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is no local folder and was not found on Hugging Face",
            "check the spelling; if it is private run `hf auth login`",
        )
    if isinstance(error, errors.NotASafetensorsRepoError):
        return (
            "has no safetensors weights",
            "convert it where you trust its pickle: from_pretrained(id).save_pretrained(folder), then give the folder",
        )
    if isinstance(error, errors.SafetensorsParsingError):
        return f"has a safetensors header that cannot be read ({one_line(error, 200)})", "tell its owners"
    if isinstance(error, errors.HFValidationError):
        return "is no local folder and cannot be an id of Hugging Face", "check the spelling"
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(getattr(getattr(error, "response", None), "status_code", None))
    offline = isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    if offline and isinstance(error, (ConnectionError, FileNotFoundError)):
        return (
            f"{_ABSENT}, as HF_HUB_OFFLINE is set",
            "unset it, go online and repeat, or give a local folder",
        )
    if isinstance(error, (ConnectionError, FileNotFoundError, TimeoutError)) or _of_the_network(error):
        return _ABSENT, "go online and repeat, or give a local folder"
    if isinstance(error, OSError):
        return f"could not be stored ({one_line(error, 200)})", "free some space in the Hugging Face cache"
    return f"{_ABSENT} ({type(error).__name__}: {one_line(error, 200)})", "go online and repeat, or give a local folder"


def _answer(status: Any) -> tuple[str, str]:
    """Of an answer that is an error, by its status."""
    meaning, remedy = _ANSWERS.get(status, ("", "go online and repeat later, or give a local folder"))
    said = meaning or (f"it answers with status {status}" if isinstance(status, int) else "it answers with an error")
    reached = "Hugging Face does not give it" if meaning else "Hugging Face cannot be reached"
    return f"is no local folder and not in the local cache, and {reached}: {said}", remedy


def _of_the_network(error: Exception) -> bool:
    """Whether a library below huggingface_hub could not reach anything: their kinds share no base with Python's own."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp")
