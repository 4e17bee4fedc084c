"""JAX as the oracle: random programs of collectives and elementwise operations, the same in jax.lax and compat.lax.

A program is data: steps that both interpreters run, one with jax.lax and the axis name, one with compat.lax and the two
handles; what follows the axis in a call is the same text. Values, vjp, jvp, vmap, second derivatives, and torch's
checkpoint against jax.checkpoint, must agree in float64, simulated (rules inside the axis and autograd around it) and
in real processes: eager, compiled, and for the exported program, which was traced with other values.

make test-jax installs JAX and runs this; FCOMM_JAX_PROGRAMS and FCOMM_JAX_SEED choose how many programs and which.
By itself, python tests/test_jax.py MINUTES draws until the time is over.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fcomm
from fcomm.compat import lax

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

PROGRAMS = int(os.environ.get("FCOMM_JAX_PROGRAMS", "24"))
SEED = int(os.environ.get("FCOMM_JAX_SEED", "0"))
TRANSFORMS = ("forward", "vjp", "jvp", "vmap", "jvp of vjp", "checkpoint")
# torch's checkpoint works under no transform of torch.func, and under vmap, hence simulate, only if compiled.
NESTED = TRANSFORMS[:-1]


@dataclass(frozen=True)
class Program:
    """steps: (name, indices of earlier values, positional arguments, keyword arguments). Value 0 is the argument x."""

    size: int
    shape: tuple[int, ...]
    steps: tuple[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]], ...]
    seed: int

    @property
    def collectives(self) -> list[str]:
        return [name for name, *_ in self.steps if name in COLLECTIVES]

    @property
    def beyond_vmap(self) -> bool:
        """Whether jax.vmap cannot run it: blocks of ranks, a partial ppermute, an all_to_all of a shared value."""
        partial = any(name == "ppermute" and len(args[0]) < self.size for name, _, args, _ in self.steps)
        blocks = any("axis_index_groups" in options for *_, options in self.steps)
        return partial or blocks or not {"all_to_all", "pswapaxes"}.isdisjoint(self.collectives)


# --- drawing ------------------------------------------------------------------------------------------------------

# Each takes (random, shape, size) and returns the arguments after the axis and the shape of the result, or None if the
# shape does not allow it.


def _same(random: Random, shape: tuple[int, ...], n: int) -> Any:
    return (), {}, shape


def _all_gather(random: Random, shape: tuple[int, ...], n: int) -> Any:
    tiled = random.random() < 0.5 and bool(shape)
    axis = random.randrange(-len(shape), len(shape)) if tiled else random.randrange(len(shape) + 1)
    options = {k: v for k, v in (("axis", axis), ("tiled", tiled)) if v or random.random() < 0.5}
    place = axis % max(len(shape), 1) if tiled else axis
    if tiled:
        return (), options, (*shape[:place], shape[place] * n, *shape[place + 1 :])
    return (), options, (*shape[:place], n, *shape[place:])


def _psum_scatter(random: Random, shape: tuple[int, ...], n: int) -> Any:
    tiled = random.random() < 0.5
    axes = [k for k, d in enumerate(shape) if (d % n == 0 and d > 0 if tiled else d == n)]
    if not axes:
        return None
    k = random.choice(axes)
    options = {name: v for name, v in (("scatter_dimension", k), ("tiled", tiled)) if v or random.random() < 0.5}
    return (), options, (*shape[:k], *((shape[k] // n,) if tiled else ()), *shape[k + 1 :])


def _all_to_all(random: Random, shape: tuple[int, ...], n: int) -> Any:
    tiled = random.random() < 0.5
    axes = [k for k, d in enumerate(shape) if (d % n == 0 and d > 0 if tiled else d == n)]
    if not axes:
        return None
    split, concat = random.choice(axes), random.randrange(len(shape))
    result = list(shape)
    if tiled:
        result[split] //= n
        result[concat] *= n
    else:
        del result[split]
        result.insert(concat, n)
    return (split, concat), {"tiled": tiled} if tiled or random.random() < 0.5 else {}, tuple(result)


def _ppermute(random: Random, shape: tuple[int, ...], n: int) -> Any:
    destinations = random.sample(range(n), n)
    perm = tuple(zip(range(n), destinations, strict=True))
    return (tuple(random.sample(perm, random.randint(1, n)) if random.random() < 0.4 else perm),), {}, shape


def _pshuffle(random: Random, shape: tuple[int, ...], n: int) -> Any:
    return (tuple(random.sample(range(n), n)),), {}, shape


def _pswapaxes(random: Random, shape: tuple[int, ...], n: int) -> Any:
    axes = [k for k, d in enumerate(shape) if d == n]
    return ((random.choice(axes),), {}, shape) if axes else None


def _pbroadcast(random: Random, shape: tuple[int, ...], n: int) -> Any:
    return (random.randrange(n),), {}, shape


COLLECTIVES: dict[str, Callable[..., Any]] = {
    "psum": _same,
    "pmean": _same,
    "pmax": _same,
    "pmin": _same,
    "all_gather": _all_gather,
    "psum_scatter": _psum_scatter,
    "all_to_all": _all_to_all,
    "ppermute": _ppermute,
    "pshuffle": _pshuffle,
    "pswapaxes": _pswapaxes,
    "pbroadcast": _pbroadcast,
}
WITHOUT_BLOCKS = ("ppermute", "pshuffle", "pbroadcast")
LOCAL = ("sin", "tanh", "scale", "add", "mul", "swapaxes", "flatten", "sum", "by rank", "constant", "tree")


def _blocks(random: Random, n: int) -> list[list[int]]:
    length = random.choice([k for k in range(1, n + 1) if n % k == 0])
    ranks = random.sample(range(n), n)
    return [ranks[k : k + length] for k in range(0, n, length)]


def draw(random: Random) -> Program:
    """A program of 3 to 9 steps whose last value depends on a collective."""
    n = random.choice((1, 2, 2, 3, 3, 4))
    shape = tuple(random.choice((1, 2, 3, n, n, 2 * n)) for _ in range(random.randint(0, 3)))
    shapes = [shape]
    steps: list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    length = random.randint(3, 9)
    while len(steps) < length:
        # Mostly the newest value, so that programs are deep rather than wide.
        i = len(shapes) - 1 if random.random() < 0.8 else random.randrange(len(shapes))
        s = shapes[i]
        if random.random() < 0.55:
            name = random.choice(list(COLLECTIVES))
            blocks = _blocks(random, n) if name not in WITHOUT_BLOCKS and random.random() < 0.25 else None
            drawn = COLLECTIVES[name](random, s, len(blocks[0]) if blocks else n)
            if drawn is None or torch.Size(drawn[2]).numel() > 96:
                continue
            args, options, result = drawn
            options |= {"axis_index_groups": blocks} if blocks else {}
            steps.append((name, (i,), args, options))
        else:
            name = random.choice(LOCAL)
            operands, args, result = (i,), (), s
            if name in ("add", "mul"):
                operands = (i, random.choice([j for j, other in enumerate(shapes) if other == s]))
            elif name == "swapaxes" and len(s) >= 2:
                args = tuple(random.sample(range(len(s)), 2))
                swapped = list(s)
                swapped[args[0]], swapped[args[1]] = s[args[1]], s[args[0]]
                result = tuple(swapped)
            elif name == "flatten" and len(s) >= 2:
                result = (torch.Size(s).numel(),)
            elif name == "sum" and s:
                args = (random.randrange(len(s)),)
                result = (*s[: args[0]], *s[args[0] + 1 :])
            elif name in ("swapaxes", "flatten", "sum"):
                continue
            steps.append((name, operands, args, {}))
        shapes.append(result)
    program = Program(n, shape, tuple(steps), random.randrange(2**31))
    return program if program.collectives else draw(random)


# --- running ------------------------------------------------------------------------------------------------------


def interpret(program: Program, x: Any, xp: Any, collective: Callable[..., Any], rank: Callable[[], Any]) -> Any:
    """The program on one rank; xp is torch or jax.numpy."""
    values = [x]
    for name, operands, args, options in program.steps:
        v = values[operands[0]]
        if name in COLLECTIVES:
            y = collective(name, v, *args, **options)
        elif name in ("sin", "tanh"):
            y = getattr(xp, name)(v)
        elif name == "scale":
            y = 0.5 * v + 0.25
        elif name == "add":
            y = v + values[operands[1]]
        elif name == "mul":
            y = v * values[operands[1]]
        elif name == "swapaxes":
            y = xp.swapaxes(v, *args)
        elif name == "flatten":
            y = v.reshape(-1)
        elif name == "sum":
            y = v.sum(args[0])
        elif name == "by rank":
            y = v * (1.0 + rank())
        elif name == "constant":
            y = v / collective("psum", 1)
        else:
            tree = collective("psum", {"a": v, "b": [xp.sin(v), None]})
            y = 0.5 * (tree["a"] + tree["b"][0])
        values.append(y)
    return values[-1]


def on_rank(program: Program, group: fcomm.Group, backend: fcomm.Backend) -> Callable[[Tensor], Tensor]:
    def collective(name: str, x: Any, *args: Any, **options: Any) -> Any:
        return getattr(lax, name)(x, group, backend, *args, **options)

    return lambda x: interpret(program, x, torch, collective, lambda: lax.axis_index(group, backend))


def inputs(program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """x, a cotangent of y, a tangent of x: the ranks stacked."""
    group = fcomm.axis("i", program.size)
    generator = torch.Generator().manual_seed(program.seed)

    def normal(shape: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    x = normal((program.size, *program.shape))
    y = fcomm.simulate(on_rank(program, group, fcomm.sim), group)(x)
    return x, normal(y.shape), normal(x.shape)


def transformed(f: Callable[[Tensor], Tensor], transform: str, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    """What a transform makes of f, on one rank or around all of them."""
    if transform == "forward":
        return f(x)
    if transform == "vjp":
        return vjp(f, x)[1](ct)[0]
    if transform == "jvp":
        return jvp(f, (x,), (t,))[1]
    if transform == "vmap":
        return vmap(f, in_dims=-1, out_dims=-1)(torch.stack((x, t), -1))
    if transform == "checkpoint":
        return pulled(lambda x: checkpoint(f, x, use_reentrant=False), x, ct)
    return jvp(lambda x: vjp(f, x)[1](ct)[0], (x,), (t,))[1]


def pulled(f: Callable[[Tensor], Tensor], x: Tensor, ct: Tensor) -> Tensor:
    """The vjp by torch.autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, ct)[0]


class _Module(torch.nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def exported(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """f through torch.export, traced with values other than x."""
    program = torch.export.export(_Module(f), (x + 1,))
    # A graph with vmap in it, such as simulate's, names its level until its ops are decomposed.
    return (program.run_decompositions() if _has_levels(program) else program).module()


def _has_levels(program: torch.export.ExportedProgram) -> bool:
    return any("batch_dim" in str(node.target) for node in program.graph.nodes)


def exported_graph(f: Callable[..., Tensor], *args: Tensor) -> Callable[..., Tensor]:
    """f, which takes derivatives, through make_fx and torch.export, which accepts no torch.func derivative directly."""
    others = tuple(v + 1 for v in args)
    return torch.export.export(make_fx(f)(*others), others).module()


def with_jax(program: Program, x: Tensor, ct: Tensor, t: Tensor, use_shard_map: bool) -> dict[str, Tensor]:
    """All transforms of the program by JAX, in float64."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def collective(name: str, x: Any, *args: Any, **options: Any) -> Any:
        if name in ("pmax", "pmin"):
            # jax.lax.pmax has no derivative; a max over the gathered values has one, which ties share.
            return getattr(jnp, name[1:])(jax.lax.all_gather(x, "i", **options), axis=0)
        if name == "pbroadcast":
            # Not lowered on CPU; this is its definition in JAX's documentation.
            return jax.lax.psum(jnp.where(jax.lax.axis_index("i") == args[0], x, jnp.zeros_like(x)), "i")
        return getattr(jax.lax, name)(x, "i", *args, **options)

    def one_rank(x: Any) -> Any:
        return interpret(program, x, jnp, collective, lambda: jax.lax.axis_index("i"))

    def all_ranks(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if not use_shard_map:
            return jax.vmap(f, axis_name="i", axis_size=program.size)
        mesh = jax.sharding.Mesh(jax.devices()[: program.size], ("i",))
        spec = jax.sharding.PartitionSpec("i")
        return jax.shard_map(lambda x: f(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def everything(x: Any, ct: Any, t: Any) -> tuple[Any, ...]:
        f = all_ranks(one_rank)
        y, pull = jax.vjp(f, x)
        push = jax.jvp(f, (x,), (t,))[1]
        second = jax.jvp(lambda x: jax.vjp(f, x)[1](ct)[0], (x,), (t,))[1]
        again = jax.vjp(all_ranks(jax.checkpoint(one_rank)), x)[1](ct)[0]
        # vmap written out: jax.vmap of a collective inside an axis raises IndexError for some of these programs.
        return y, pull(ct)[0], push, jnp.stack((f(x), f(t)), -1), second, again

    results = jax.jit(everything)(*(jnp.asarray(v.numpy()) for v in (x, ct, t)))
    return {name: torch.from_numpy(jax.device_get(v).copy()) for name, v in zip(TRANSFORMS, results, strict=True)}


def differences(got: Tensor, expected: Tensor, what: str) -> list[str]:
    try:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    except AssertionError as error:
        return [f"{what}: {error}"]
    return []


Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def simulated(program: Program, name: str, traced: Callable[[Tensor], Tensor], number: int) -> dict[str, Way]:
    """The ways to a transform of the simulated program; traced is the exported whole. number selects some of them."""
    group = fcomm.axis("i", program.size)
    f = on_rank(program, group, fcomm.sim)
    inside = fcomm.simulate(lambda x, ct, t: transformed(f, name, x, ct, t), group)
    ways: dict[str, Way] = {"exported": lambda x, ct, t: transformed(traced, name, x, ct, t)}
    if name in NESTED:
        ways["inside"] = inside
    if name not in ("forward", "vmap"):
        ways["around"] = lambda x, ct, t: transformed(fcomm.simulate(f, group), name, x, ct, t)
    if number % 8 == 0 and name in NESTED:
        ways["compiled"] = torch.compile(inside, fullgraph=True, backend="aot_eager")
    elif number % 8 == 0:
        again = fcomm.simulate(lambda x: checkpoint(f, x, use_reentrant=False), group)
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
        ways["compiled"] = lambda x, ct, t: pulled(compiled, x, ct)
    if number % 4 == 2 and name in NESTED:
        ways["exported inside"] = lambda x, ct, t: exported_graph(inside, x, ct, t)(x, ct, t)
    return ways


def check_simulated(program: Program, number: int) -> tuple[Counter[str], list[str], list[str]]:
    """How many values were compared with JAX's, by way, what differed, and what JAX could not do."""
    x, ct, t = inputs(program)
    group = fcomm.axis("i", program.size)
    use_shard_map = program.beyond_vmap or program.seed % 2 == 0
    count = Counter[str]()
    try:
        expected = with_jax(program, x, ct, t, use_shard_map)
    except Exception as error:
        how = "shard_map" if use_shard_map else "vmap"
        return count, [], [f"{how}: {type(error).__name__}: {str(error)[:200]}: {program}"]
    torch.compiler.reset()
    traced = exported(fcomm.simulate(on_rank(program, group, fcomm.sim), group), x)
    failures = []
    for name in TRANSFORMS:
        for way, run in simulated(program, name, traced, number).items():
            try:
                got = run(x, ct, t)
            except Exception as error:
                failures.append(f"{name} {way} of {program}: {type(error).__name__}: {str(error)[:300]}")
                continue
            failures += differences(got, expected[name], f"{name} {way} of {program}")
            count[way] += 1
    return count, failures, []


def check_programs(programs: list[Program]) -> tuple[Counter[str], list[str], list[str]]:
    count, failures, refused = Counter[str](), [], []
    for k, program in enumerate(programs):
        compared, wrong, impossible = check_simulated(program, k)
        count, failures, refused = count + compared, failures + wrong, refused + impossible
    return count, failures, refused


def run_programs(world: fcomm.Group, programs: list[Program]) -> list[dict[tuple[str, str], Tensor]]:
    """This rank's results of all programs, ways and transforms, on c10d and cpu in turn."""
    results = []
    for k, program in enumerate(programs):
        x, ct, t = (v[world.rank] for v in inputs(program))
        f = on_rank(program, world, (fcomm.c10d, fcomm.cpu)[k % 2])

        def nested(x: Tensor, ct: Tensor, t: Tensor, f: Any = f) -> list[Tensor]:
            return [transformed(f, name, x, ct, t) for name in NESTED]

        traced = exported(f, x)
        result = {("eager", name): transformed(f, name, x, ct, t) for name in TRANSFORMS}
        result |= {("exported", name): transformed(traced, name, x, ct, t) for name in TRANSFORMS}
        if k % 6 < 2:
            torch.compiler.reset()
            compiled = torch.compile(nested, fullgraph=True, backend="aot_eager")
            result |= {("compiled", name): y for name, y in zip(NESTED, compiled(x, ct, t), strict=True)}
            again = torch.compile(
                lambda x, f=f: checkpoint(f, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
            )
            result["compiled", "checkpoint"] = pulled(again, x, ct)
        results.append(result)
    return [{k: v.detach() for k, v in result.items()} for result in results]


@pytest.fixture(scope="module", autouse=True)
def _jax_is_here() -> None:
    pytest.importorskip("jax", reason="make test-jax installs JAX and runs this file")


@pytest.mark.long
@pytest.mark.parametrize("block", range(4))
def test_simulated_programs_equal_jax(block: int) -> None:
    random = Random(SEED * 1000 + block)
    programs = [draw(random) for _ in range(max(PROGRAMS // 4, 2))]
    count, failures, refused = check_programs(programs)
    assert not failures, "\n".join(failures)
    assert count
    assert 4 * len(refused) <= len(programs), "JAX refuses too many programs:\n" + "\n".join(refused)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_programs_in_processes_equal_jax(size: int) -> None:
    random = Random(SEED * 1000 + 500 + size)
    programs = [p for p in (draw(random) for _ in range(8 * PROGRAMS)) if p.size == size][: max(PROGRAMS // 2, 1)]
    ranks = fcomm.run(run_programs, size, programs, timeout_s=600)
    failures = []
    for k, program in enumerate(programs):
        expected = with_jax(program, *inputs(program), use_shard_map=True)
        for way, name in ranks[0][k]:
            got = torch.stack([results[k][way, name] for results in ranks])
            failures += differences(got, expected[name], f"{name} {way} in processes of {program}")
    assert not failures, "\n".join(failures)


@pytest.mark.long
def test_the_comparison_notices_a_wrong_program() -> None:
    """Planted faults: a different permutation, and a gather along a different axis."""
    perm = ((0, 1), (1, 2), (2, 0))
    right = Program(3, (3, 3), (("ppermute", (0,), (perm,), {}), ("all_gather", (1,), (), {"axis": 1})), 1)
    inverse = tuple((d, s) for s, d in perm)
    x, ct, t = inputs(right)
    expected = with_jax(right, x, ct, t, use_shard_map=True)
    for planted in (
        (("ppermute", (0,), (inverse,), {}), right.steps[1]),
        (right.steps[0], ("all_gather", (1,), (), {"axis": 0})),
    ):
        group = fcomm.axis("i", 3)
        program = Program(3, (3, 3), planted, 1)
        traced = exported(fcomm.simulate(on_rank(program, group, fcomm.sim), group), x)
        for name in TRANSFORMS:
            zero = name == "jvp of vjp"  # a linear program
            for run in simulated(program, name, traced, number=2).values():
                assert bool(differences(run(x, ct, t), expected[name], name)) is not zero


def search(minutes: float) -> None:
    """Draw programs until the time is over, showing progress; exit 1 at the first differences."""
    deadline, seed, programs, count = time.monotonic() + 60 * minutes, SEED, 0, Counter[str]()
    refused: list[str] = []
    names = Counter[str]()
    while time.monotonic() < deadline:
        random = Random(1_000_000 + seed)
        drawn = [draw(random) for _ in range(8)]
        compared, failures, impossible = check_programs(drawn)
        if failures:
            sys.exit(f"seed {seed}: " + "\n".join(failures))
        seed, programs, count = seed + 1, programs + len(drawn) - len(impossible), count + compared
        refused += impossible
        for program in drawn:
            names.update(program.collectives)
        left = f"{time.monotonic() - deadline:+.0f} s"
        print(f"\r{programs} programs, {count.total()} values equal, {left}", end="", flush=True)
    print(f"\n{len(refused)} more programs JAX itself cannot do", *refused, sep="\n")
    print(f"{programs} programs, {count.total()} arrays equal to JAX's, {dict(count)}")
    print(f"calls: {dict(names.most_common())}")


if __name__ == "__main__":
    search(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
