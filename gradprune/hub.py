"""Whether the Hugging Face hub can be reached: checked once and briefly, as its clients retry for half a minute."""

from threading import Thread

from huggingface_hub import constants, get_session

from gradprune.errors import one_line

_TIMEOUT = 5.0  # seconds


def hub_fault() -> str | None:
    """Why the hub cannot be reached, in a few words; None if it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []
    # In a separate thread, because name resolution has no timeout.
    asking = Thread(target=lambda: found.append(_ask()), daemon=True)
    asking.start()
    asking.join(_TIMEOUT)
    return found[0] if found else f"{constants.ENDPOINT} cannot be reached: no answer in {_TIMEOUT:g} s"


def _ask() -> str | None:
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    # The client, and with it its exceptions, differs from release to release.
    except Exception as error:
        return f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
    return None
