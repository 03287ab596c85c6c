"""A run that is stopped in the middle of an epoch and goes on is the one that was not stopped, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from fourfold.data import Collator, pack
from fourfold.data.preference import encode_preferences  # noqa: F401
