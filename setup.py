"""Compiles engine._cpu always, engine._cuda where nvcc is found; metadata is in pyproject.toml."""

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.modified import newer_group

# engine/kernels is a link to ../kernels. A top-level `kernels` would hide Hugging Face's package.
PACKAGES = [
    *(str(path.parent).replace("/", ".") for path in sorted(Path("engine").rglob("__init__.py"))),
    *("engine.kernels", *(f"engine.kernels.{op}" for op in ("angular", "layer", "w4"))),
]

MACHINE = platform.machine()
X86, ARM = MACHINE in ("x86_64", "AMD64"), MACHINE in ("aarch64", "arm64")
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni".split()]
X86_FLAGS = {  # csrc/cpu/<op>_<isa>.cpp is compiled on x86 alone, with these
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512bf16"],
}
ARM_FLAGS = {  # and these on 64-bit ARM
    "neon": [],
    "dotprod": ["-march=armv8.2-a+dotprod"],
    "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}
HERE = X86_FLAGS if X86 else ARM_FLAGS if ARM else {}
MACRO = "SHALLOW_X86" if X86 else "SHALLOW_ARM" if ARM else "SHALLOW_GENERIC"
CXX_FLAGS = "-std=c++17 -O3 -g0 -fvisibility=hidden -pthread".split()
# Else GCC advances two pointers as one vector, by way of memory: a load waits for two stores that
# it cannot take together, and a block of 8 rows of AVX-VNNI takes 31 ns instead of 26.
CXX_FLAGS += ["-fno-tree-slp-vectorize"]
LINK_FLAGS = ["-pthread"]
if emulates := os.environ.get("SHALLOW_EMULATE"):  # AVX-VNNI and AMX by AVX-512: see the Makefile
    CXX_FLAGS += ["-DSHALLOW_EMULATE"]
    EMULATED = [*AVX512, "-mavx512bf16", "-include", "cpu/emulate.h"]
    X86_FLAGS |= {"avxvnni": EMULATED, "amx": EMULATED}
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
if sanitizer := os.environ.get("SHALLOW_SANITIZE"):  # see the Makefile
    if sanitizer not in SANITIZERS:
        raise SystemExit(f"SHALLOW_SANITIZE must be one of {[*SANITIZERS]}, found {sanitizer!r}.")
    CXX_FLAGS += [*SANITIZERS[sanitizer], "-O1", "-g1", "-fno-omit-frame-pointer"]
    # Else -O1 leaves products and sums apart that -O3 fuses, and what it rounds is not what ships.
    CXX_FLAGS += ["-fexpensive-optimizations"]
    LINK_FLAGS += SANITIZERS[sanitizer]
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in (80, 90, 100)]
NVCC_FLAGS += ["-gencode=arch=compute_100,code=compute_100"]  # PTX, for what comes after


def isa(source: str) -> str:
    """The instruction set that a file's name asks for, "" for a portable file."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in X86_FLAGS or suffix in ARM_FLAGS else ""


def sources(folder: str) -> list[str]:
    # Portable files first: the linker keeps the first copy of an inline function, and one that
    # was compiled for AVX-512 would stop an older processor.
    found = [str(path) for path in Path(folder).iterdir() if path.suffix in (".cpp", ".cu")]
    order = ["", *HERE]
    found = [source for source in found if isa(source) in order]
    return sorted(found, key=lambda source: (order.index(isa(source)), source))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, in its usual place or of the package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    package = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    places = [f"{home}/bin"] if home else []  # else an old /bin/nvcc would hide that of PATH
    places += [os.environ["PATH"], "/usr/local/cuda/bin", *map(str, package)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


class BuildExt(build_ext):
    """Compiles each file with its own flags, in parallel, and only where something changed."""

    def build_extensions(self):
        for command in (self.compiler.compiler_so[0], self.compiler.compiler_cxx[0]):
            if not shutil.which(command):
                raise SystemExit(f"Shallow needs a C++ compiler: no `{command}` (Debian: g++).")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SystemExit("Shallow needs the Python headers: no Python.h (Debian: python3-dev).")
        if not NVCC:
            print("engine._cuda is left out: nvcc is neither in CUDA_HOME nor on PATH.")
        if self.editable_mode:  # pip's own folder is gone after the run, and all would be compiled
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(Path("build", f"temp.{tag}"))
        # Objects of two versions of pybind11 do not go together.
        self.build_temp = str(Path(self.build_temp, f"pybind11-{pybind11.__version__}"))
        super().build_extensions()

    def build_extension(self, ext):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile(ext, source), ext.sources))
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        if ext.name == "engine._cuda":
            self.spawn([NVCC, "-shared", "-cudart=static", *objects, "-o", target])
        else:
            link = self.compiler.link_shared_object
            link(objects, target, extra_postargs=LINK_FLAGS, target_lang="c++")

    def compile(self, ext: Extension, source: str) -> str:
        target = str(Path(self.build_temp, source).with_suffix(".o"))
        if not self.force and not newer_group([source, *ext.depends], target):
            return target
        self.mkpath(str(Path(target).parent))
        if source.endswith(".cu"):
            self.spawn([NVCC, "-c", source, "-Icsrc", *NVCC_FLAGS, "-o", target])
        else:
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[(MACRO, None)],
                include_dirs=["csrc", pybind11.get_include()],
                extra_postargs=[*CXX_FLAGS, *HERE.get(isa(source), [])],
            )
        return target


class Sdist(sdist):
    """Keeps engine/kernels a link, where setuptools puts a second copy of kernels/."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        link = Path(base_dir, "engine", "kernels")
        shutil.rmtree(link)
        link.symlink_to("../kernels")


NVCC = None if sanitizer or emulates else find_nvcc()
headers = ["setup.py", *(str(path) for path in Path("csrc").rglob("*.*h"))]
cuda = Extension("engine._cuda", sources("csrc/cuda"), depends=headers, optional=True)
setup(
    packages=PACKAGES,
    package_data={
        "engine": ["data/*", "py.typed", "report/*.jinja"],
        "engine.kernels": ["*/*.json"],
    },
    include_package_data=False,
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
    ext_modules=[
        Extension("engine._cpu", sources("csrc/cpu"), depends=headers),
        *([cuda] if NVCC else []),
    ],
)
