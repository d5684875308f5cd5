"""aoti: a .pt2 file that torch has compiled for CPUs like this one; `torch._inductor.aoti_load_package(file)(images)`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.program_file import write_program
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source
from lpvit_cli.progress import Progress
from lpvit_cli.targets.base import METADATA_KEY

FILE = "model.aoti.pt2"


class Aoti(Format):
    """Compiling takes minutes for a large model, and a C++ compiler."""

    precisions = ("float32",)

    def require(self) -> None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise EnvironmentFault(
                "export.formats: aoti compiles the model, and there is no C++ compiler here",
                "install one (Debian, Ubuntu: apt install g++), or name yours in the environment variable CXX",
            ) from error

    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        def save(program: ExportedProgram, metadata: str) -> None:
            progress("compiling", 0, 1, "")
            # with threads fixed, the file would use as many as there are here
            settings = {"aot_inductor.metadata": {METADATA_KEY: metadata}, "cpp.dynamic_threads": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(work / FILE), inductor_configs=settings)

        source.notes.append(f"the speed of {FILE} is the compiler's merit too: the dense model runs uncompiled beside it")
        source.notes.append(f"{FILE} is machine code for this kind of CPU and this torch ({torch.__version__})")
        return write_program("aoti", FILE, save, source, work, progress)
