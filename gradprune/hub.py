"""A quick check whether the Hugging Face hub can be reached, because its clients retry for half a minute."""

from threading import Thread

from huggingface_hub import constants, get_session

from gradprune.errors import one_line

_TIMEOUT = 5.0  # seconds


def hub_fault() -> str | None:
    """Return why the hub cannot be reached, in a few words, or None if it can be reached."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []
    # The request runs in a thread of its own, because name resolution has no timeout.
    asking = Thread(target=lambda: found.append(_ask()), daemon=True)
    asking.start()
    asking.join(_TIMEOUT)
    return found[0] if found else f"{constants.ENDPOINT} cannot be reached: no answer in {_TIMEOUT:g} s"


def _ask() -> str | None:
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    # Releases of huggingface_hub differ in their HTTP client and hence in its exceptions.
    except Exception as error:
        return f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
    return None
