"""Kernels compiled ahead of time, for cards that are not here, and what came of it.

    python -m flashmaps.kernels.ahead sm_90        # a table: registers, spills, shared memory

The launches are those that the backend would make, on tensors without memory.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from flashmaps.kernels import launch_gradient
from flashmaps.kernels.composing import compose
from flashmaps.kernels.launches import reduce
from flashmaps.kernels.run import Launch, Run
from flashmaps.kernels.settings import Settings, settings_of
from flashmaps.maps.gradients import is_float, of_results, with_companions
from flashmaps.maps.problem import Gradient, Problem, Request, empty_outputs
from torch import Tensor

# What a program may have of shared memory, in bytes. (NVIDIA: CUDA programming guide, "technical
# specifications per compute capability"; AMD: CDNA3 instruction set, local data share.)
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# How matrix instructions begin in the assembly of each architecture.
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Case:
    """A problem to compile for: H heads, N queries, M keys, d numbers a head; and what of it."""

    names: tuple[str, ...]
    heads: int = 5
    queries: int = 4096
    keys: int = 4096
    dim: int = 64
    dtype: torch.dtype = torch.float16
    precision: str = "highest"  # of torch's float32 products
    normalize: str = "block"
    masked: bool = False  # a bias, head weights, pairs
    known_lse: bool = True
    columns: int = 64  # of operands, or cells
    k: int = 8
    layout: str = "heads first"  # or "tokens first", or "dims first"
    composed: bool = False  # of A A', where A' is the same map the other way
    backward: bool = False  # the way back from these results

    def __str__(self) -> str:
        of = f"{self.heads}x{self.queries}" + (f"x{self.keys}" if self.keys != self.queries else "")
        words = [f"{of}x{self.dim}", str(self.dtype).removeprefix("torch.")]
        if self.dtype == torch.float32 and self.precision != "highest":
            words.append(self.precision)
        words += [self.normalize] * (self.normalize != "block") + ["masked"] * self.masked
        words += [self.layout] * (self.layout != "heads first") + ["composed"] * self.composed
        words += ["backward"] * self.backward
        if set(self.names) & {"product", "transposed_product", "pooled_keys"}:
            words.append(f"C={self.columns}")
        return "+".join(self.names) + " " + " ".join(words)

    def _tokens(self, count: int, device: str) -> Tensor:
        sizes = (2, self.heads, count, self.dim)
        order = {
            "heads first": (0, 1, 2, 3),
            "tokens first": (0, 2, 1, 3),
            "dims first": (0, 1, 3, 2),
        }[self.layout]
        made = torch.randn([sizes[i] for i in order], dtype=self.dtype, device=device)
        return made.permute([order.index(i) for i in range(4)])

    def problem(self, queries: int, keys: int, device: str = "meta") -> Problem:
        """The map. Its log-sum-exp is not known, but that of noise."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        side = int(keys**0.5)
        return Problem(
            query=self._tokens(queries, device),
            key=self._tokens(keys, device),
            bias=zeros(2, keys) if self.masked else None,
            head_weights=zeros(self.heads) + 1 / self.heads if self.masked else None,
            pairs=zeros(2, 2, dtype=torch.int64) if self.masked else None,
            lse=zeros(2, self.heads, queries) + math.log(keys) + 0.5 if self.known_lse else None,
            scale=self.dim**-0.5,
            normalize=self.normalize,
            grid_height=side,
            grid_width=keys // side,
        )

    def launches(self, architecture: str) -> list[Launch]:
        """What the backend launches for it."""
        return self.launches_with(settings_of(architecture, self.precision))

    def launches_with(self, settings: Settings) -> list[Launch]:
        """What the backend launches for it in other settings."""
        found: list[Launch] = []
        self.runner(settings, "meta", found.append)()
        return found

    def runner(
        self, settings: Settings, device: str, launch: Callable[[Launch], None] = Launch.run
    ) -> Callable[[], object]:
        """A call of the backend with this problem."""
        problem, request = self.problem(self.queries, self.keys, device), self.request(device)
        if self.composed:
            back = self.problem(self.keys, self.queries, device)
            return lambda: compose(problem, back, request, Run(settings, launch))
        if self.backward:
            gradient = self.gradient(problem, request)
            room = launch_gradient.STRIP_BYTES
            return lambda: launch_gradient.backward(problem, gradient, Run(settings, launch), room)
        return lambda: reduce(problem, request, Run(settings, launch))

    def request(self, device: str = "meta") -> Request:
        """What is wanted of the map."""
        partner = None
        if "return_probability" in self.names:
            partner = self.problem(self.keys, self.queries, device)
        return Request(
            self.names,
            right=torch.randn((2, self.keys, self.columns), device=device),
            left=torch.randn((2, self.queries, self.columns), device=device),
            k=self.k,
            cells=torch.arange(self.keys, device=device) % self.columns,
            num_cells=self.columns,
            partner=partner,
        )

    def gradient(self, problem: Problem, request: Request) -> Gradient:
        """Where each result has a gradient, for whom all may want one."""
        results = empty_outputs(problem, replace(request, names=with_companions(request.names)))
        upstream = {name: results[name] for name in request.names if is_float(name)}
        wanted = ("query", "key", *(("bias", "head_weights") if self.masked else ()))
        return of_results(problem, request, results, upstream, wanted)


_ROWS = ("entropy", "max", "argmax", "expectation")
_COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")
_SQUARE = Case((*_ROWS, "diagonal"))

# Every kernel and every reducer, at the size that matters most.
REPRESENTATIVE = (
    Case(_ROWS, known_lse=False),
    Case(_COLUMNS, queries=4000, masked=True),
    Case(("product",)),
    Case(("topk_values", "topk_indices")),
    Case(("dense",), keys=4097, masked=True),
    Case(("return_probability",)),
    Case(_ROWS, keys=77, known_lse=False),
    Case(_ROWS, dtype=torch.float32, known_lse=False),
    Case((*_ROWS, "diagonal"), composed=True),
    Case(("entropy", "expectation"), backward=True),
)


def every_case() -> Iterator[Case]:
    """What else compiles to other code: dims, dtypes, layouts, masks, lines, operands."""
    groups = (
        (*_ROWS, "diagonal"), _COLUMNS, ("product",), ("transposed_product",), ("dense",),
        ("topk_values", "topk_indices"), ("pooled_keys",), ("return_probability",),
    )  # fmt: skip
    for names in groups:
        plain = Case(names, known_lse=False)
        for dim in (8, 40, 64, 72, 80, 128, 160, 256):
            yield replace(plain, dim=dim)
        for dtype, precision in (
            (torch.bfloat16, "highest"),
            (torch.float32, "highest"),
            (torch.float32, "high"),
        ):
            for dim in (64, 128, 256):
                yield replace(plain, dtype=dtype, precision=precision, dim=dim)
        yield replace(plain, masked=True, queries=4001 if names[-1] != "diagonal" else 4096)
        yield replace(plain, masked=True, keys=77, queries=4096 if names[-1] != "diagonal" else 77)
        yield replace(plain, masked=True, keys=256, dtype=torch.float32, queries=256)
        yield replace(plain, heads=1, queries=65536, keys=65536)
        for lines in ("rows", "columns"):
            yield replace(plain, normalize=lines)
        for layout in ("tokens first", "dims first"):
            yield replace(plain, layout=layout, queries=4095, keys=4095)
    for precision in ("highest", "high", "medium"):
        for queries in (4096, 4001):
            yield replace(_SQUARE, composed=True, precision=precision, queries=queries)
    for name in ("product", "transposed_product", "pooled_keys"):
        for columns in (1, 3, 17, 200, 256):
            yield Case((name,), columns=columns)
    yield from _every_backward()
    for k in (1, 64, 100):
        yield Case(("topk_values", "topk_indices"), k=k)


def _every_backward() -> Iterator[Case]:
    plain = Case(("entropy", "expectation"), backward=True)
    for dim in (8, 40, 72, 128, 160, 256):
        yield replace(plain, dim=dim)
    for dim in (64, 128, 256):
        yield replace(plain, dtype=torch.float32, dim=dim)
    yield replace(plain, dtype=torch.bfloat16)
    yield replace(plain, dtype=torch.float32, precision="high")
    # No grid has so many keys: no expectation.
    everything = ("entropy", "max", *_COLUMNS, "product", "topk_values", "return_probability")
    for dim in (40, 160):
        masked = replace(plain, names=everything, masked=True, dim=dim)
        yield replace(masked, queries=4001, keys=4003)
        yield replace(masked, dtype=torch.float32, queries=4001, keys=77)
    for lines in ("rows", "columns"):
        yield replace(plain, normalize=lines)
    yield replace(plain, layout="dims first", queries=4095, keys=4095)


@dataclass(frozen=True)
class Compiled:
    """What a kernel became."""

    kernel: str
    tile: str
    architecture: str
    registers: int
    spills: int  # instructions that move registers to or from memory
    stack: int  # bytes
    shared: int  # bytes
    matrix: int  # matrix instructions
    exps: int  # exp2 instructions
    copies: int  # instructions that copy tiles from global to shared memory
    atomics: int
    instructions: int

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spills or (self.stack and self.architecture == "gfx942"):
            found.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.instructions < 32:  # seen where the matrix unit's memory is too small
            found.append("compiled to next to nothing")
        if self.atomics:
            found.append(f"{self.atomics} atomic instructions")
        if self.shared > SHARED[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory")
        return found


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(types, constants, divisibilities), as triton's own launcher specialises."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def key_of(launch: Launch) -> str:
    """What decides about the code: launches with equal keys compile to the same."""
    types, constants, attributes = _signature(launch)
    return repr((launch.kernel.__name__, types, constants, sorted(attributes), *launch.tiling))


def compile_launch(launch: Launch, architecture: str) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = (
        GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        if architecture.startswith("sm_")
        else GPUTarget("hip", architecture, 64)
    )
    source = ASTSource(launch.kernel, *_signature(launch))
    return triton.compile(source, target=target, options=launch.tiling.options)


def examine(launch: Launch, architecture: str) -> Compiled:
    """Compile it, and read the machine code."""
    compiled = compile_launch(launch, architecture)
    constants = launch.arguments
    tile = f"{constants['R']}x{constants['C']}" if "R" in constants else str(constants["BLOCK"])
    tile += f" {launch.tiling.warps}w {launch.tiling.stages}s"
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found is not None, name
            return int(found.group(1))

        operations = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.M))
        registers, stack = field("vgpr_count"), field("private_segment_fixed_size")
        # Scalar registers spill into lanes of vector registers, which are no memory.
        spills = sum(n for name, n in operations.items() if name.startswith("scratch_"))
        spills += field("vgpr_spill_count")
        exps = sum(n for name, n in operations.items() if name.startswith("v_exp_f32"))
        copies = sum(n for name, n in operations.items() if name.startswith("global_load_lds"))
        atomics = sum(n for name, n in operations.items() if "_atomic_" in name)
    else:
        usage, operations = _disassembled(compiled.asm["cubin"])
        registers, stack = usage
        spills = sum(n for name, n in operations.items() if name[:3] in ("LDL", "STL"))
        exps = operations["MUFU.EX2"]
        copies = sum(n for name, n in operations.items() if name.startswith("LDGSTS"))
        # From PTX: Blackwell's machine code takes some to hand out the matrix unit's own memory.
        atomics = len(re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", compiled.asm["ptx"], re.M))
    matrix = sum(n for name, n in operations.items() if name.startswith(MATRIX[architecture]))
    return Compiled(
        launch.kernel.__name__, tile, architecture, registers, spills, stack,
        compiled.metadata.shared, matrix, exps, copies, atomics, operations.total(),
    )  # fmt: skip


def _disassembled(cubin: bytes) -> tuple[tuple[int, int], Counter[str]]:
    """((registers, stack), how often each instruction) by the tools that come with triton."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"

    def run(tool: str, *arguments: str) -> str:
        return subprocess.run(
            [tools / tool, *arguments], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage", file.name))
        sass = run("nvdisasm", "-c", file.name)
    assert usage is not None
    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
    return (int(usage[1]), int(usage[2])), Counter(re.findall(instruction, sass, re.M))


def examine_cases(
    cases: list[Case], architecture: str, workers: int = 1
) -> list[tuple[Case, Compiled]]:
    """Each different kernel of some cases, beside the first case that wants it."""
    wanted: dict[str, tuple[Case, int]] = {}
    for case in cases:
        for index, launch in enumerate(case.launches(architecture)):
            wanted.setdefault(key_of(launch), (case, index))
    jobs = [(case, index, architecture) for case, index in wanted.values()]
    if workers == 1:
        found = [_examine_one(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = list(pool.map(_examine_one, *zip(*jobs, strict=True)))
    return [(case, each) for (case, _, _), each in zip(jobs, found, strict=True)]


def _examine_one(case: Case, index: int, architecture: str) -> Compiled:
    return examine(case.launches(architecture)[index], architecture)


def table(found: list[tuple[Case, Compiled]]) -> str:
    """Markdown."""
    lines = [
        "| case | kernel | tile | registers | spills | shared | matrix | exp2 | copies | all | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for case, each in found:
        lines.append(
            f"| {case} | {each.kernel} | {each.tile} | {each.registers} | {each.spills} | "
            f"{each.shared} | {each.matrix} | {each.exps} | {each.copies} | {each.instructions} "
            f"| {', '.join(each.problems())} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """`python -m flashmaps.kernels.ahead [--all] ARCHITECTURE...`"""
    whole = "--all" in arguments
    cases = list(every_case()) if whole else list(REPRESENTATIVE)
    for architecture in [name for name in arguments if name != "--all"] or list(SHARED):
        print(f"\n{architecture}\n")
        print(table(examine_cases(cases, architecture, workers=os.cpu_count() or 1)))


if __name__ == "__main__":
    main(sys.argv[1:])
