"""A data set's subflavor `rsa`: whether its samples may enter the RSA loss."""

from collections.abc import Mapping

# YAML's words, which arrive as text where somebody has put them in quotes.
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_rsa_flag(subflavors: Mapping | None, *, default: bool) -> bool:
    """Return what a data set's subflavors say, and `default` where they have no `rsa`.

    Raises:
        ValueError: `rsa` is neither true nor false.
    """
    flag = (subflavors or {}).get("rsa", default)
    flag = _WORDS.get(flag.lower(), flag) if isinstance(flag, str) else flag
    if not isinstance(flag, bool):
        raise ValueError(f"its data set's subflavor rsa is {flag!r}; it must be true or false")
    return flag
