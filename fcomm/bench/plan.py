"""Plan: what to measure. Row: what was measured. Both are plain values that cross process borders as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

from fcomm.group import BACKENDS
from fcomm.registration import RECORDS

# nccl-tests' names of types, and torch's; the first name of a type is printed.
DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    rivals: contestants besides our own backend: "c10d", "funcol", "mpi", "copy", "add".
    iters: calls per round; 0: as many as fit in round_s.  warmup, check: calls before the rounds, calls compared.
    """

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    backend: str
    ranks: int = 2
    dtype: str = "float"
    op: str = "sum"
    root: int = 0
    iters: int = 0
    warmup: int = 2
    check: int = 1
    rounds: int = 9
    round_s: float = 0.01
    rivals: tuple[str, ...] = ()
    compiled: bool = False
    modules: tuple[str, ...] = ()
    timeout_s: float = 600.0
    stream: bool = True

    @property
    def ours(self) -> str:
        """The name of our own contestant."""
        return f"fcomm.{self.backend}"


@dataclass(frozen=True)
class Row:
    """One size of one collective.

    times_us: {contestant: microseconds per call, one for each round}.  wrong: {contestant: elements that differ}.
    absent: {contestant: why it could not take part}.
    """

    collective: str
    size: int
    count: int
    dtype: str
    op: str
    root: int
    ranks: int
    ours: str
    times_us: dict[str, list[float]]
    wrong: dict[str, int]
    absent: dict[str, str] = field(default_factory=dict)
    compiled: bool = False

    def time_us(self, contestant: str) -> float:
        """Median over the rounds."""
        return median(self.times_us[contestant])

    def ratio(self, contestant: str) -> float:
        """How many times longer the contestant takes than we do: the median of the rounds' ratios."""
        return median(t / o for t, o in zip(self.times_us[contestant], self.times_us[self.ours], strict=True))

    def spread(self, contestant: str) -> float:
        """The noise: the distance between the quartiles over the rounds, as a fraction of the median."""
        times = self.times_us[contestant]
        if len(times) < 2:
            return 0.0
        low, middle, high = quantiles(times, n=4, method="inclusive")
        return (high - low) / middle

    def bandwidth(self, contestant: str) -> tuple[float, float]:
        """Algorithm and bus bandwidth in GB/s, as nccl-tests' doc/PERFORMANCE.md defines them."""
        factor = RECORDS[self.collective].busbw
        algorithm = self.size / self.time_us(contestant) / 1e3
        return algorithm, algorithm * (factor(self.ranks) if factor else 1.0)


def measurable() -> list[str]:
    """The collectives that state their bus traffic; recv is measured together with send."""
    return [name for name, record in RECORDS.items() if record.busbw and name != "recv"]


def machines() -> list[str]:
    """The backends that can be measured: programs run on the CPU, in processes."""
    return [name for name, b in BACKENDS.items() if name != "sim" and (not b.devices or "cpu" in b.devices)]
