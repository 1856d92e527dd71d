"""The file that `--plot` names: asked for before a long run, and written after it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def require_picture(path: Path) -> None:
    """Ask that `path` can be written by matplotlib.

    Raises:
        ConfigError: matplotlib is not installed, the folder is not there, or the name is none.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ConfigError(f"--plot {path}: it is a folder; name a file, like hits.png")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in {"", *kinds}:  # without one, matplotlib adds .png
        raise ConfigError(f"--plot {path}: use a name that ends with .png, .svg or .pdf")


def save_picture(figure: Any, path: Path) -> None:  # noqa: ANN401  (matplotlib's Figure)
    """Write it and close it.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
