"""Where the examples lie: in an installed wheel within the package, in a checkout beside it."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
EXAMPLES = _PACKAGE / "examples" if (_PACKAGE / "examples").is_dir() else _PACKAGE.parent / "examples"
