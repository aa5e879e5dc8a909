"""Compiles every kernel ahead of time for the GPUs we name, on a machine without one: `python -m sglmoe.kernels.compile`.

Prints what each takes (registers a thread, shared memory, local memory) and exits with 1 where one spills registers to memory
or does not compile. Shows that the compiler takes them, not that they run.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglmoe.kernels import blocks, dispatch, mailbox, page_in
from sglmoe.kernels.exponent_codec import decode_gpu, page_in_packed

CAPABILITIES = (80, 89, 90)  # A100; L40S and RTX 4090; H100 and H200
WARP_SIZE = 32
ALIGNED = (("tt.divisibility", 16),)  # what torch's allocations are, and rows of the arena


class Specimen(msgspec.Struct, frozen=True):
    """A kernel as it is launched: types of its arguments in order, "*" for pointers, and its constants."""

    kernel: Any  # triton.JITFunction
    types: str
    constants: dict[str, int] = {}
    num_warps: int = 4

    @property
    def name(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__} {constants}".strip()

    def source(self) -> ASTSource:
        """What the compiler takes. Pointers are aligned to 16 bytes; of numbers nothing is known."""
        types = self.types.split()
        arguments = [name for name in self.kernel.arg_names if name not in self.constants]
        assert len(types) == len(arguments), f"{self.name}: {arguments}"
        signature = dict(zip(arguments, types, strict=True))
        signature |= dict.fromkeys(self.constants, "constexpr")
        pointers = [i for i, name in enumerate(self.kernel.arg_names) if "*" in signature[name]]
        return ASTSource(
            self.kernel,
            signature={name: signature[name] for name in self.kernel.arg_names},
            constexprs=dict(self.constants),
            attrs={(index,): [list(fact) for fact in ALIGNED] for index in pointers},
        )


class Figures(msgspec.Struct, frozen=True):
    """What a compiled kernel takes: registers and bytes of local memory a thread, bytes of shared memory a program."""

    registers: int
    local_bytes: int  # registers that were spilled live there, and arrays that are indexed
    shared_bytes: int


# The sizes of large models: blocks of 16 and 128 rows; 128 to 512 experts, sets of as many frames.
SPECIMENS = (
    *(
        Specimen(
            blocks.wave_blocks_kernel,
            "*i32 *i32 *i32 *i32 *i32 *i32 *i32 i32",
            {"BLOCK_TOKENS": rows, "CHUNK": 256},
        )
        for rows in (16, 128)
    ),
    Specimen(
        page_in.page_in_kernel,
        "*i32 *i32 *i32 *i32 *i32 i32 i32",
        {"CHUNK": page_in.CHUNK_WORDS},
        page_in.NUM_WARPS,
    ),
    Specimen(
        page_in_packed.page_in_packed_kernel,
        "*u8 *i16 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32",
        {
            "PARTS": 4,
            "GROUP": page_in_packed.TILES_AT_ONCE,
            "ESCAPES": page_in_packed.ESCAPES_AT_ONCE,
        },
        page_in_packed.NUM_WARPS,
    ),
    Specimen(decode_gpu.decode_tile, "*u8 *i64 *i16 *i64 i32", num_warps=decode_gpu.NUM_WARPS),
    *(
        Specimen(
            dispatch.dispatch_kernel,
            " ".join(["*i32"] * 18 + ["i32"] * 5),
            {
                "EXPERTS": experts,
                "FRAMES": frames,
                "IDS": dispatch.ids_at_a_time(pairs, experts),
                "BLOCK_TOKENS": rows,
                "PAIRS": dispatch.PAIRS_AT_A_TIME,
            },
            dispatch.num_warps(max(experts, frames)),
        )
        for experts, frames in ((64, 64), (128, 64), (256, 256), (512, 512))
        for pairs, rows in ((8, 16), (640, 64))
    ),
    Specimen(mailbox.post_kernel, "*i32 *i32 i32 i32 i32 i32 i32", num_warps=1),
    Specimen(
        mailbox.commit_kernel,
        "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32",
        num_warps=1,
    ),
)


def compile_for(specimen: Specimen, capability: int) -> Any:
    """The compiled kernel, with its code in all stages as `asm`."""
    target = GPUTarget("cuda", capability, WARP_SIZE)
    return triton.compile(
        specimen.source(), target=target, options={"num_warps": specimen.num_warps}
    )


def figures(compiled: Any) -> Figures:
    """Read them off the machine code, with the cuobjdump that comes with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}
    return Figures(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def cuobjdump() -> str:
    """NVIDIA's reader of machine code."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def compile_all(specimens: Iterable[Specimen]) -> bool:
    """Print a line for each kernel and GPU; whether none spills."""
    print(f"{'kernel':72} {'sm':>3} {'registers':>9} {'shared bytes':>12} {'local bytes':>11}")
    is_good = True
    for specimen, capability in itertools.product(specimens, CAPABILITIES):
        its = figures(compile_for(specimen, capability))
        is_good &= its.local_bytes == 0
        note = "" if its.local_bytes == 0 else "  spills"
        print(
            f"{specimen.name:72} {capability:>3} {its.registers:>9} {its.shared_bytes:>12} "
            f"{its.local_bytes:>11}{note}"
        )
    return is_good


if __name__ == "__main__":
    sys.exit(0 if compile_all(SPECIMENS) else 1)
