"""Builds the native CPU kernel; everything else about the package stands in pyproject.toml.

The kernel is a plain shared library, loaded with ctypes: it does not see Python's or PyTorch's headers, so
one binary serves every version of both. It is optional: without a C compiler the installation goes on, and
the PyTorch reference computes the same bits.
"""

from __future__ import annotations

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildSharedLibrary(build_ext):
    """Compiles without the traits of a Python extension: no version in the file's name, no PyInit symbol."""

    def build_extensions(self) -> None:
        # Fused multiply-adds would round once where the reference rounds twice.
        if self.compiler.compiler_type != "msvc":
            for extension in self.extensions:
                extension.extra_compile_args = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "fourfold.kernels._blockwise_cpu",
            sources=["src/fourfold/kernels/blockwise_cpu.c"],
            depends=["src/fourfold/kernels/blockwise_cpu.c"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildSharedLibrary, "bdist_wheel": PlatformWheel},
)
