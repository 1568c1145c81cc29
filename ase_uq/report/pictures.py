"""Pictures of a page: in the page itself, and as files beside it."""

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ase_uq.report.axes import Axes, plt
from ase_uq.report.output import PICTURE_METADATA

if TYPE_CHECKING:  # `axes` says what to install where matplotlib is missing
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Args:
        alt: Description for readers who cannot see it.
        source: The PNG file as a data URI.
        caption: Text below it. It names lines by what they are, not by their colours, which a dark page changes.
        small: The same picture with larger letters for narrow screens, as a data URI; may be empty.
    """

    alt: str
    source: str
    caption: str = ""
    small: str = ""


@dataclass
class Album:
    """The pictures of a page, in its order.

    Args:
        files: PNG files by name.
    """

    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, ax: Axes, alt: str, caption: str = "", *, small: Axes | None = None) -> Picture:
        """Adds a picture to the files, and returns it for the page; the figures are closed."""
        buffer = io.BytesIO()
        _figure_of(ax).savefig(buffer, format="png", dpi=200, metadata=PICTURE_METADATA)
        self.files[f"{name}.png"] = buffer.getvalue()
        return Picture(alt, _data_uri(ax), caption, "" if small is None else _data_uri(small))


def _figure_of(ax: Axes) -> "Figure":
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _data_uri(ax: Axes) -> str:
    """The figure as a transparent PNG; the figure is closed."""
    buffer = io.BytesIO()
    _figure_of(ax).savefig(buffer, dpi=150, transparent=True)
    plt.close(_figure_of(ax))
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
