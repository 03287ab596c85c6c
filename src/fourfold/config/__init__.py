"""A run's configuration: one flat typed model, read from one YAML file and the command line."""

from __future__ import annotations

from fourfold.config.loading import load_config
from fourfold.config.run import RunConfig

__all__ = ["RunConfig", "load_config"]
