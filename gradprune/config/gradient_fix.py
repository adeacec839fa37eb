"""The names of the fixes for vanishing gradients, which `gradprune.vanishing.scaling` computes."""

from gradprune.config.domains import Domain
from gradprune.errors import ConfigError

# Several of these joined by "+" are a fix, too.
GRADIENT_FIXES = ("adaptive", "normalize", "depth:linear", "depth:sqrt", "depth:log")


def check_gradient_fix(fix: str) -> None:
    """Accept "none", "auto", one of `GRADIENT_FIXES`, or several of these joined by "+".

    Raises:
        ConfigError: a fix is unknown; the message names it.
    """
    fault = _fault(fix)
    if fault is not None:
        raise ConfigError(f"gradient_fix: {fault}")


def _fault(fix: str) -> str | None:
    if fix in ("none", "auto"):
        return None
    for name in fix.split("+"):
        if name not in GRADIENT_FIXES:
            return (
                f"'{name}' in '{fix}' is unknown; choose none, auto, one of {', '.join(GRADIENT_FIXES)}, "
                "or several of them joined by +"
            )
    return None


FIX_OR_CHAIN = Domain(f"none, auto, one of {', '.join(GRADIENT_FIXES)}, or several of them joined by +", _fault)
