"""Objects as a notebook or a debugger shows them: short, whatever they hold."""

from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any

_LONGEST = 60  # characters of one value
_MOST = 4  # entries of a collection that are shown


class Brief:
    """Base of dataclasses whose fields would fill pages: arrays are shown by their shapes."""

    def __repr__(self) -> str:
        assert is_dataclass(self)
        shown = (f"{field.name}={_brief(getattr(self, field.name))}" for field in fields(self) if field.repr)
        return f"{type(self).__name__}({', '.join(shown)})"


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """Names and values as a table of HTML, for notebooks."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<b>{escape(title)}</b><table>{cells}</table>"


def _brief(value: Any) -> str:
    if getattr(value, "ndim", 0) and hasattr(value, "dtype"):
        return f"<{'×'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}>"
    if isinstance(value, Mapping) and not isinstance(value, str):
        return _some([f"{key!r}: {_brief(entry)}" for key, entry in list(value.items())[:_MOST]], len(value), "{}")
    if isinstance(value, list | tuple | Set):
        brackets = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        return _some([_brief(entry) for entry in list(value)[:_MOST]], len(value), brackets)
    if is_dataclass(value) and not isinstance(value, Brief):
        return f"{type(value).__name__}(…)"
    text = repr(value)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 1]}…" if isinstance(value, str) else f"{type(value).__name__}(…)"


def _some(shown: list[str], number: int, brackets: str) -> str:
    text = ", ".join(shown)
    if number <= len(shown) and len(text) <= 4 * _LONGEST:
        return f"{brackets[0]}{text}{brackets[1]}"
    return f"{brackets[0]}… {number} …{brackets[1]}"
