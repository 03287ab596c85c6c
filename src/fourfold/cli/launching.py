"""Starting a verb in several processes: torchrun does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fourfold.errors import ConfigError

__all__ = ["launch", "torchrun_words"]


def torchrun_words(words: Sequence[str], num_processes: int) -> list[str]:
    """The command that runs `fourfold WORDS` in so many processes of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*torchrun, "-m", "fourfold", *words]


def launch(words: Sequence[str], num_processes: int) -> None:
    """Become torchrun. Raises ConfigError where torchrun has started this process already."""
    if "RANK" in os.environ:
        raise ConfigError(
            "the processes are started already", found="--num_processes within torchrun", hint="leave it out"
        )
    os.execv(sys.executable, torchrun_words(words, num_processes))
