"""Build of the compiled core; everything else is declared in pyproject.toml."""

from __future__ import annotations

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [Extension("fastq._core", ["fastq/_core.pyx"])],
        build_dir="build/cython",  # the generated C stays out of the source tree
        compiler_directives={"language_level": "3"},
    )
)
