"""Resource usage of a compiled Triton kernel, read from its binary and PTX with the tools in Triton's wheel."""

import json
import linecache
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DeviceLimits:
    """Limits of a compute capability, and the size of a typical GPU of it."""

    shared_per_sm: int
    shared_per_block: int
    multiprocessors: int
    l2_bytes: int
    max_threads: int = 2048
    max_blocks: int = 32
    tensor_columns: int = 0  # columns of tensor memory, where tcgen05 accumulates


DEVICES = {
    80: DeviceLimits(164 << 10, 163 << 10, 108, 40 << 20),
    90: DeviceLimits(228 << 10, 227 << 10, 132, 50 << 20),
    100: DeviceLimits(228 << 10, 227 << 10, 148, 126 << 20, tensor_columns=512),
}

MMA = {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Access:
    """Instructions of one width in bytes that were compiled from one line of the kernel."""

    kind: str  # ld, st or atom
    width: int
    count: int
    source: str


@dataclass
class Kernel:
    """One specialisation on one architecture, or the launch that failed."""

    name: str
    cases: list[str]  # which launch it
    arch: int
    error: str = ""
    hash: str = ""
    grid: list[int] = field(default_factory=list)
    constexprs: dict[str, str] = field(default_factory=dict)
    warps: int = 0
    stages: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    shared: int = 0
    occupancy: float = 0.0
    dots: list[str] = field(default_factory=list)  # dtypes and precisions of the products in the source
    mma: dict[str, int] = field(default_factory=dict)
    accesses: list[Access] = field(default_factory=list)

    @property
    def case(self) -> str:
        return self.cases[0] + (f" +{len(self.cases) - 1}" if len(self.cases) > 1 else "")

    @property
    def two_byte_dots(self) -> bool:
        return any(dot.startswith(("bf16", "f16")) for dot in self.dots)

    def widths(self, kind: str) -> str:
        """Widths of the narrowest and widest access of a kind."""
        widths = [access.width for access in self.accesses if access.kind == kind]
        return "-".join(str(width) for width in sorted({min(widths), max(widths)})) if widths else ""


def load(text: str) -> list[Kernel]:
    """Kernels from a JSON list."""
    records = json.loads(text)
    return [Kernel(**record | {"accesses": [Access(**access) for access in record["accesses"]]}) for record in records]


def measure(compiled: Any, kernel: Kernel) -> None:
    """Fill in the resource usage of a compiled kernel."""
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    used = _resource_usage(compiled.asm["cubin"])
    kernel.hash, kernel.warps, kernel.stages = compiled.hash, metadata.num_warps, metadata.num_stages
    kernel.registers, kernel.stack = used["REG"], used["STACK"] + used["LOCAL"]
    # Spilled registers are on the stack, so a kernel without a stack needs no second run of ptxas.
    kernel.spills = _spilled_bytes(ptx, kernel.arch) if kernel.stack else 0
    # From sm_90 on, the first KiB, reserved by the system, counts as static; `occupancy` adds it for all.
    kernel.shared = metadata.shared + (used["SHARED"] if kernel.arch < 90 else max(0, used["SHARED"] - 1024))
    kernel.occupancy = occupancy(DEVICES[kernel.arch], kernel, getattr(metadata, "tmem_size", 0) or 0)
    kernel.dots = _dots(compiled.asm["ttir"])
    counts = {kind: len(re.findall(pattern, ptx)) for kind, pattern in MMA.items()}
    kernel.mma = {kind: count for kind, count in counts.items() if count}
    kernel.accesses = _accesses(ptx)


def occupancy(device: DeviceLimits, kernel: Kernel, tensor_columns: int) -> float:
    """Fraction of a multiprocessor's warps that can be resident at once."""
    granted = -(-kernel.registers // 8) * 8 * 32  # registers per warp
    resident = 4 * (16384 // granted)  # every quarter of the multiprocessor has 16384
    blocks = [
        device.max_blocks,
        device.max_threads // (32 * kernel.warps),
        resident // kernel.warps,
        device.shared_per_sm // (kernel.shared + 1024),
    ]
    if tensor_columns:
        blocks.append(device.tensor_columns // tensor_columns)
    return min(blocks) * kernel.warps * 32 / device.max_threads


def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    line = next(line for line in out.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def _spilled_bytes(ptx: str, arch: int) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)
        assert target is not None
        command = [_tool("ptxas-blackwell" if arch >= 100 else "ptxas"), "-v", f"--gpu-name={target[1]}"]
        log = subprocess.run(
            [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", log))


def _dots(ttir: str) -> list[str]:
    """Every tl.dot as 'bf16', or 'f32 ieee' if it has a precision."""
    found = re.findall(r"tt\.dot\b([^\n]*?): tensor<[\dx]*x(\w+)>", ttir)
    precisions = (re.search(r"inputPrecision = (\w+)", options) for options, _type in found)
    return sorted({f"{of} {p[1]}" if p else of for (_options, of), p in zip(found, precisions, strict=True)})


_FILE = re.compile(r'\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?')
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_DIRECT = re.compile(r"\b(ld|st|atom|red)\.(?:[\w:]+\.)*global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z]+(\d+)(?:x2)?\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, *(\w+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.(global)?")


def _accesses(ptx: str) -> list[Access]:
    """Global accesses with their source lines, from the `.loc` before them.

    Triton 3.8 advances that line with every line of inline assembly; only the first one is the kernel's.
    """
    paths = {m[1]: str(Path(m[2]) / m[3]) if m[3] else m[2] for m in map(_FILE.match, ptx.splitlines()) if m}
    counts: Counter[tuple[str, int, str]] = Counter()
    source, instructions = "", -1  # number of instructions of the current inline assembly, negative outside
    for line in ptx.splitlines():
        if "inline asm" in line:
            instructions = 0 if "begin" in line else -1
        elif place := _LOCATION.match(line):
            if instructions <= 0:
                source = linecache.getline(paths.get(place[1], ""), int(place[2])).strip()
        else:
            instructions += instructions >= 0
        if direct := _DIRECT.search(line):
            kind = "atom" if direct[1] == "red" else direct[1]
            counts[kind, int(direct[2] or 1) * int(direct[3]) // 8, source] += 1
        elif copy := _COPY.search(line):
            counts["ld", int(copy[1], 0), source] += 1
        elif bulk := _BULK.search(line):
            counts["st" if bulk[1] else "ld", 128, source] += 1
    return [Access(kind, width, count, source) for (kind, width, source), count in counts.items()]
