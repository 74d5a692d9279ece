"""Declarative reconciler for VM backup exports."""

from typing import Final

__version__: Final = "0.1.0"
