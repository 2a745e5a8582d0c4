"""Figures that commands write."""

from __future__ import annotations

import io
import pathlib

from matplotlib.figure import Figure

from mlra_jax.errors import UserError
from mlra_jax.storage import write_whole


def figure_formats() -> list[str]:
    """The formats in which a figure can be written: suffixes without the dot."""
    return sorted(Figure().canvas.get_supported_filetypes())


def check_figure(option: str, name: str) -> pathlib.Path:
    """The file in which a figure is to be written.

    Args:
      option: of the command, for the message.
      name: its value.

    Raises:
      UserError: no format belongs to the suffix, or it is a folder.
    """
    path, formats = pathlib.Path(name).expanduser(), figure_formats()
    if path.suffix[1:].lower() not in formats or path.is_dir():
        raise UserError(f"{option} {name} must be a file that ends in .{', .'.join(formats)}.")
    return path


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure, in the format of the suffix, whole or not at all; makes its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
    write_whole(path, picture.getvalue())
