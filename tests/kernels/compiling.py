"""Compiles Triton kernels for GPUs that are not there: what the interpreter lets pass, the compiler may not.

Run as a script, apart from the tests: where TRITON_INTERPRET is set, Triton makes nothing that can be compiled.

    python tests/kernels/compiling.py [--arch 80 90]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile


@dataclass(frozen=True)
class Variant:
    """One way a kernel is launched.

    Args:
        kernel: What `triton.jit` made.
        arguments: Name -> Triton's type ("*bf16", "i32", "fp32"), or a constant: None, a stride of 1, a constexpr.
        options: num_warps, num_stages, enable_fp_fusion.
        unaligned: Arguments that are not divisible by 16; all other pointers and integers are taken to be.
        archs: The GPUs that it is launched on.
        tolerated: Bytes of registers spilled that count as none: of tiles measured to be faster all the same.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90)
    tolerated: int = 0


def compile_variant(variant: Variant, arch: int) -> tuple[str, int]:
    """Name with its constants, and bytes of registers spilled."""
    kernel = variant.kernel
    names = list(kernel.arg_names)
    constexprs, signature, attrs = {}, {}, {}
    for index, name in enumerate(names):
        value = variant.arguments[name]
        is_constant = kernel.params[index].is_constexpr or not isinstance(value, str)
        signature[name] = "constexpr" if is_constant else value
        if is_constant:
            constexprs[name] = value
        elif name not in variant.unaligned and (value.startswith("*") or value in ("i32", "i64")):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    constants = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in constexprs.items())
    # Triton asks for more than 48 KiB by what it allots itself; what inline assembly declares comes on top.
    declared = sum(map(int, re.findall(r"^\s*\.shared .*\[(\d+)\];", compiled.asm["ptx"], re.MULTILINE)))
    allotted = compiled.metadata.shared
    assert not declared or declared + allotted <= 48 * 1024, f"{constants}: {declared} + {allotted} bytes shared"
    uses_stack = _uses_stack(compiled.asm["cubin"])
    return f"{kernel.__name__}({constants})", _spilled(compiled.asm["ptx"], arch) if uses_stack else 0


def _uses_stack(cubin: bytes) -> bool:
    """Whether a kernel has any memory that registers could be spilled to: told in a twentieth of the time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = re.findall(r"\b(?:STACK|LOCAL):(\d+)", report)
    assert len(sizes) == 2, report
    return any(map(int, sizes))


def _spilled(ptx: str, arch: int) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))


def variants() -> Iterator[Variant]:
    """Those of every file `variants_*.py` beside this one, each with a list VARIANTS."""
    for path in sorted(Path(__file__).parent.glob("variants_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from module.VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    for arch in parser.parse_args().arch:
        for variant in (each for each in variants() if arch in each.archs):
            name, spilled = compile_variant(variant, arch)
            print(f"sm_{arch} spilled {max(0, spilled - variant.tolerated):5d}  {name}")


if __name__ == "__main__":
    sys.modules["compiling"] = sys.modules["__main__"]
    main()
