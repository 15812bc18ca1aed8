"""How to install what a message says is missing."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """The command that installs an extra, such as `train`, from the source tree that this module is in if it is in one.

    No registry has fastppo, so `pip install "fastppo[train]"` works only where fastppo is installed already.
    """
    if not (_ROOT / "pyproject.toml").is_file():
        return f'pip install "fastppo[{extra}]"'
    return f'pip install -e "{"." if Path.cwd() == _ROOT else _ROOT}[{extra}]"'
