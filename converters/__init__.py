"""Converters: what rewrites a model's modules before it is parallelised, and the table that names them.

Importing this package imports no torch: the config loader reads `CONVERTERS` in milliseconds. A row's
`build` imports the converter's code only when a run asks for it.

A newcomer adds a file or folder here, one row below, and one field in ``converters/config.py``
(``docs/adding_a_converter.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.base import ConversionReport, ConversionRow, Converter, ConverterContext, ConverterEntry

if TYPE_CHECKING:
    from converters.config import Float8SectionConfig

__all__ = [
    "CONVERTERS",
    "ConversionReport",
    "ConversionRow",
    "Converter",
    "ConverterContext",
    "ConverterEntry",
]


def _build_float8(section: Float8SectionConfig, context: ConverterContext) -> Converter:
    from converters.float8.converter import Float8Converter

    return Float8Converter(section, context)


_FLOAT8 = ConverterEntry(
    name="quantize.linear.float8",
    section="quantize.linear.float8",
    description="nn.Linear -> Float8Linear: the three GEMMs of a linear run in float8",
    build=_build_float8,
)

CONVERTERS: dict[str, ConverterEntry] = {
    "quantize.linear.float8": _FLOAT8,
    "float8": _FLOAT8,
}
