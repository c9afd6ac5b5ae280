"""Declares the compiled kernels; everything else about the build is in pyproject.toml.

SNAPCORE_SANITIZE=address,undefined (or thread) builds them under a sanitizer; see CONTRIBUTING.md.
"""

import os

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = ("scan", "digest", "lz", "pages", "blockmap", "core", "space", "log", "volume", "nbd", "presence")

sanitize = os.environ.get("SNAPCORE_SANITIZE", "")
flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else ["-O3"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"snapcore.{name}",
                [f"src_pyx/{name}.pyx"],
                include_dirs=[numpy.get_include()],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
                extra_compile_args=flags,
                extra_link_args=flags[:1] if sanitize else [],
            )
            for name in KERNELS
        ],
        include_path=["."],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "freethreading_compatible": True,
        },
    )
)
