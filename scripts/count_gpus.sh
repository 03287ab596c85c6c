#!/bin/sh
# Prints how many NVIDIA GPUs this machine has. The device files serve where nvidia-smi is not installed (containers).
if num=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') && [ "$num" -gt 0 ]; then
    echo "$num"
else
    find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | wc -l | tr -d ' '
fi
