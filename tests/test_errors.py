"""Bad input, by exact text: raised before any communication, the same on all ranks, and the group works afterwards.

bad_input.py has the calls of collectives. Also here is what is accepted: handles that travel, lists in other forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import BAD, BAD_IN_PROCESSES, BAD_ON_AN_AXIS, X
from torch import Tensor

import fcomm
from fcomm import ArgumentError, FcommError, Group, GroupClosedError
from fcomm.testing import run_ranks

# Errors of the handles themselves, on the ranks of a group of 2.
BAD_GROUPS: list[tuple[Callable[[Group], Any], type[Exception], str]] = [
    (
        lambda g: fcomm.subgroup(g, 0, name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are 0; pass a list of ranks of 'world'",
    ),
    (
        lambda g: fcomm.split(g, 2, name="world"),
        FcommError,
        "split: a live group 'world' of ranks [0, 1] exists; close it with fcomm.close, or choose another name",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 2**16, 0, 2, name="s"),
        ArgumentError,
        "stateless_group: 's' is to meet at host '127.0.0.1', port 65536; pass the name or address of rank 0's host, "
        "and a port of 1 .. 65535 that is free there",
    ),
    (
        lambda g: fcomm.stateless_group(7, 80, 0, 2, name="s"),
        ArgumentError,
        "stateless_group: 's' is to meet at host 7, port 80; pass the name or address of rank 0's host, "
        "and a port of 1 .. 65535 that is free there",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 0, 0, 2, name="s"),
        ArgumentError,
        "stateless_group: 's' is to meet at host '127.0.0.1', port 0; pass the name or address of rank 0's host, "
        "and a port of 1 .. 65535 that is free there",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 80, 0, 0, name="s"),
        ArgumentError,
        "stateless_group: size of 's' is 0; pass the number of its ranks, 1 or more",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 80, 0, 2, name=None),
        ArgumentError,
        "stateless_group: name is None; pass a non-empty string, the same on every rank",
    ),
    (
        lambda g: fcomm.subgroup(g, torch.tensor([0, 2]), name="s"),
        ArgumentError,
        "subgroup: rank 2 of 's' is not in group 'world' of size 2; ranks count within it, 0 .. 1",
    ),
    (
        lambda g: fcomm.from_device_mesh(g.ranks, "tp"),
        TypeError,
        "from_device_mesh: mesh is (0, 1); pass a torch DeviceMesh",
    ),
    (
        lambda g: fcomm.apply("all_educe", X, g, fcomm.c10d),
        ArgumentError,
        "apply: no collective is named 'all_educe'; define it by fcomm.define",
    ),
    (
        lambda g: fcomm.apply("all_reduce", X, g, fcomm.c10d),
        TypeError,
        "apply: 'all_reduce' takes the tensors ('x',) and the parameters ('op',) and got 1 in all; "
        "pass (tensors), group, backend and each parameter, by position",
    ),
    (
        lambda g: fcomm.apply("all_reduce", (X, X), g, fcomm.c10d, "sum"),
        TypeError,
        "apply: 'all_reduce' takes the tensors ('x',) and the parameters ('op',) and got 3 in all; "
        "pass (tensors), group, backend and each parameter, by position",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 2], name="s"),
        ArgumentError,
        "subgroup: rank 2 of 's' is not in group 'world' of size 2; ranks count within it, 0 .. 1",
    ),
    (
        lambda g: fcomm.subgroup(g, [True], name="s"),
        ArgumentError,
        "subgroup: rank True of 's' is not in group 'world' of size 2; ranks count within it, 0 .. 1",
    ),
    (
        lambda g: fcomm.subgroup(g, [], name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are []; pass each member once, at least one",
    ),
    (
        lambda g: fcomm.subgroup(g, [1, 1], name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are [1, 1]; pass each member once, at least one",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name=""),
        ArgumentError,
        "subgroup: name is ''; pass a non-empty string, the same on every rank",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name="world"),
        FcommError,
        "subgroup: a live group 'world' of ranks [0, 1] exists; close it with fcomm.close, or choose another name",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name="s", timeout_s=0),
        ArgumentError,
        "subgroup: timeout_s is 0; pass a positive, finite number of seconds",
    ),
    (
        lambda g: fcomm.subgroup(fcomm.axis("i", 2), [0, 1], name="s"),
        ArgumentError,
        "subgroup: parent 'i' is a simulated axis; make axes, fcomm.axis(name, size), and nest them",
    ),
    (
        lambda g: fcomm.split(fcomm.axis("i", 2), 1, name="s"),
        ArgumentError,
        "split: parent 'i' is a simulated axis; make axes, fcomm.axis(name, size), and nest them",
    ),
    (
        lambda g: fcomm.mesh(fcomm.axis("i", 2), s=2),
        ArgumentError,
        "mesh: parent 'i' is a simulated axis; make axes, fcomm.axis(name, size), and nest them",
    ),
    (
        lambda g: fcomm.init(name=""),
        ArgumentError,
        "init: name is ''; pass a non-empty string, the same on every rank",
    ),
    (
        lambda g: fcomm.simulate(3, fcomm.axis("i", 2)),
        TypeError,
        "simulate: fn is 3; pass the function that each rank runs",
    ),
    (
        lambda g: fcomm.barrier(g, fcomm.c10d, after=3),
        TypeError,
        "barrier: after is int, not a tensor; pass torch.as_tensor(after)",
    ),
    (
        lambda g: fcomm.split(g, 3, name="s"),
        ArgumentError,
        "split: size is 3, but group 'world' has 2 ranks; pass a divisor of 2",
    ),
    (
        lambda g: fcomm.split(g, True, name="s"),
        ArgumentError,
        "split: size is True, but group 'world' has 2 ranks; pass a divisor of 2",
    ),
    (
        lambda g: fcomm.mesh(g, dp=2, tp=2),
        ArgumentError,
        "mesh: the sizes are {'dp': 2, 'tp': 2}, but group 'world' has 2 ranks; pass positive ints whose product is 2",
    ),
    (
        fcomm.mesh,
        ArgumentError,
        "mesh: the sizes are {}, but group 'world' has 2 ranks; pass positive ints whose product is 2",
    ),
    (
        lambda g: fcomm.mesh(g, dp=-1, tp=-2),
        ArgumentError,
        "mesh: the sizes are {'dp': -1, 'tp': -2}, but group 'world' has 2 ranks; "
        "pass positive ints whose product is 2",
    ),
    (
        lambda g: fcomm.split("world", 2, name="s"),
        TypeError,
        "split: parent is 'world'; pass a Group, from fcomm.init, fcomm.split, ...",
    ),
    (
        lambda g: fcomm.subgroup(Group("gone", (0, 1), 0), [0], name="s"),
        GroupClosedError,
        "subgroup: group 'gone' is closed; create it again",
    ),
    (
        lambda g: fcomm.close("world"),
        TypeError,
        "close: group is 'world'; pass a Group, or nothing to close all of this process",
    ),
    (lambda g: fcomm.axis("", 2), ArgumentError, "axis: name is ''; pass a non-empty string"),
    (lambda g: fcomm.axis("i", 0), ArgumentError, "axis: size of 'i' is 0; pass a positive int"),
    (lambda g: fcomm.axis("i", True), ArgumentError, "axis: size of 'i' is True; pass a positive int"),
    (
        lambda g: fcomm.init(timeout_s=float("nan")),
        ArgumentError,
        "init: timeout_s is nan; pass a positive, finite number of seconds",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 1, 2, 2, name="s"),
        ArgumentError,
        "stateless_group: rank of 's' is 2, not in 0 .. 1; pass this process's own rank",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", "80", 0, 2, name="s"),
        ArgumentError,
        "stateless_group: port of 's' is '80'; pass an int",
    ),
    (
        lambda g: fcomm.from_process_group(None, name="s"),
        FcommError,
        "from_process_group: torch.distributed is not initialised; call init_process_group or fcomm.init",
    ),
    (
        lambda g: fcomm.from_process_group("tp", name="s"),
        ArgumentError,
        "from_process_group: pg of 's' is 'tp'; pass a ProcessGroup that this process is a member of",
    ),
]


def raised(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return AssertionError, "nothing was raised"


def compare(got: tuple[type[BaseException], str], kind: type[Exception], text: str, **words: Any) -> list[str]:
    for word, value in words.items():
        text = text.replace("{" + word + "}", str(value))
    return [] if got[1] == text and issubclass(got[0], kind) else [f"{got[0].__name__}: {got[1]}\n  expected {text}"]


def bad_input_on_this_rank(world: Group) -> list[str]:
    rank, failures = world.rank or 0, []
    words: dict[str, Any] = {"group": repr(world), "backend": repr(fcomm.c10d), "rank": rank}
    words |= {"row": ["1, 2", "2, 1"][rank], "own": [[2, 0], [0, 2]][rank], "other": [[0, 2], [2, 0]][rank]}
    for call, kind, text in BAD + BAD_IN_PROCESSES:
        failures += compare(raised(lambda: call(world, fcomm.c10d)), kind, text, **words)
        # One rank's mistake leaves nothing behind: the ranks stay in step.
        if rank == 0:
            raised(lambda: call(world, fcomm.c10d))
    for make, kind, text in BAD_GROUPS:
        failures += compare(raised(lambda: make(world)), kind, text)
    y = fcomm.all_reduce(torch.tensor(rank + 1), world, fcomm.c10d)
    return failures if y.item() == 3 else [*failures, f"after all that, all_reduce is {y}"]


def test_bad_input_in_processes() -> None:
    run_ranks(bad_input_on_this_rank, 2)


def test_bad_input_on_a_simulated_axis() -> None:
    axis = fcomm.axis("world", 2)
    for call, kind, text in BAD + BAD_ON_AN_AXIS:
        if "[{row}]" in text:
            text = text.replace("send_sizes=[{row}]", "the longest row of send_sizes=[3]")

        def one_rank(x: Tensor) -> Tensor:
            failures.extend(
                compare(raised(lambda: call(axis, fcomm.sim)), kind, text, group=repr(axis), backend=repr(fcomm.sim))
            )
            return x

        failures: list[str] = []
        fcomm.simulate(one_rank, axis)(torch.zeros(2))
        assert not failures, failures[0]


def test_bad_input_in_a_compiled_program() -> None:
    axis = fcomm.axis("world", 2)
    program = torch.compile(
        fcomm.simulate(lambda x: fcomm.reduce_scatter(x, axis, fcomm.sim, dim=1), axis), backend="aot_eager"
    )
    with pytest.raises(
        Exception, match=r"reduce_scatter: x\.shape\[1\] is 3, not divisible by group 'world' of size 2"
    ):
        program(torch.ones(2, 2, 3))


def test_a_wrong_number_of_parameters_on_a_simulated_axis() -> None:
    axis = fcomm.axis("i", 2)
    text = re.escape("apply: 'all_reduce' takes the tensors ('x',) and the parameters ('op',) and got 1 in all")
    with pytest.raises(TypeError, match=text):
        fcomm.simulate(lambda x: fcomm.apply("all_reduce", x, axis, fcomm.sim), axis)(torch.ones(2))


def test_there_are_enough_messages() -> None:
    texts = {text for _, _, text in [*BAD, *BAD_IN_PROCESSES, *BAD_ON_AN_AXIS, *BAD_GROUPS]}
    assert len(texts) >= 100


def test_a_simulated_result_that_is_no_tensor() -> None:
    axis = fcomm.axis("i", 2)
    with pytest.raises(
        TypeError, match="simulate: fn returned None; return tensors, nested in tuples, lists and dicts"
    ):
        fcomm.simulate(lambda x: (x, [None]), axis)(torch.ones(2))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_simulated_argument_that_is_nested(layout: torch.layout) -> None:
    axis = fcomm.axis("i", 2)
    rows = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(
        TypeError, match="nested tensor, whose rows have lengths of their own, but all ranks of 'i' have one shape"
    ):
        fcomm.simulate(lambda x: fcomm.all_reduce(x, axis, fcomm.sim), axis)(rows)


LATER = fcomm.axis("later", 3)


class Copied(torch.autograd.Function):
    """fcomm's pvary, as it is usually written elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:  # type: ignore[override]
        return fcomm.all_reduce(ct, LATER, fcomm.sim)


def test_a_backward_that_communicates_after_simulate_has_returned() -> None:
    x = torch.arange(6.0).reshape(3, 2)

    def loss(x: Tensor) -> Tensor:
        return (Copied.apply(x) ** 2).sum()

    assert fcomm.simulate(torch.func.grad(loss), LATER)(x).tolist() == [[12, 18]] * 3
    text = re.escape(
        "all_reduce: group 'later' is a simulated axis, which a backward uses outside fcomm.simulate; take "
        "the derivative inside, fcomm.simulate(torch.func.grad(fn), axis)"
    )
    with pytest.raises(FcommError, match=text):
        torch.func.grad(lambda x: fcomm.simulate(loss, LATER)(x).sum())(x)
    with pytest.raises(FcommError, match=text):
        fcomm.simulate(loss, LATER)(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("copy", ["copy.copy", "copy.deepcopy", "pickle.dumps"])
def test_a_live_group_says_what_to_do_instead_of_copying_it(copy: str) -> None:
    module, function = copy.split(".")
    text = (
        "group 'alone' is a live handle of this process and cannot be pickled or copied; "
        "pass its name and ranks, and rebuild it there with fcomm.init and fcomm.subgroup"
    )
    with pytest.raises(TypeError) as error:
        getattr(__import__(module), function)(Group("alone", (0,), 0))
    assert str(error.value) == text


def test_a_simulated_axis_is_a_value_and_travels() -> None:
    import copy
    import pickle

    axis = fcomm.axis("i", 3)
    assert copy.deepcopy(axis) == pickle.loads(pickle.dumps(axis)) == axis


def test_coalesced_collectives_take_any_iterable() -> None:
    group = fcomm.axis("any", 2)

    def program(x: Tensor) -> list[Tensor]:
        return [
            *fcomm.all_reduce_coalesced((y for y in (x, x * 2)), group, fcomm.sim),
            *fcomm.all_gather_coalesced({"a": x}.values(), group, fcomm.sim),
            *fcomm.reduce_scatter_coalesced(iter([x, x + 1]), group, fcomm.sim),
        ]

    ys = fcomm.simulate(program, group)(torch.arange(8.0).view(2, 4))
    assert [y[1].tolist() for y in ys] == [
        [4, 6, 8, 10],
        [8, 12, 16, 20],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 10],
        [10, 12],
    ]


def sizes_of_other_integers(world: Group) -> list[str]:
    failures, x = [], torch.arange(2.0) + 2 * (world.rank or 0)
    for two in (np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([2], dtype=torch.int32)):
        one = two // 2
        for on in (fcomm.cpu, fcomm.c10d):
            got = [
                fcomm.all_gather(x, world, on, sizes=[two, two]).tolist(),
                fcomm.reduce_scatter(x, world, on, sizes=(one, one)).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=[[one, one]] * 2).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=[one, one], recv_sizes=[one, one]).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=np.array([1, 1]), recv_sizes=torch.tensor([1, 1])).tolist(),
            ]
            own = [0, 2] if world.rank == 0 else [1, 3]
            want = [[0, 1, 2, 3], [2 if world.rank == 0 else 4], own, own, own]
            failures += [] if got == want else [f"{two!r} on {on.name}: {got} is not {want}"]
    return failures


def test_sizes_may_be_arrays_tensors_and_their_entries() -> None:
    run_ranks(sizes_of_other_integers, 2)


def test_slices_that_leave_their_tensor_on_an_axis() -> None:
    """No error can depend on data there: reads outside operand give zeros, and rows outside output are dropped."""
    group = fcomm.axis("i", 2)
    offsets, lands = torch.tensor([[-1, 2], [2, -1]]), torch.tensor([[0, 0], [3, 3]])
    sizes = torch.full((2, 2), 3)

    def exchange(x: Tensor, offsets: Tensor, lands: Tensor, sizes: Tensor) -> Tensor:
        output = torch.full((5,), 9.0)
        return fcomm.ragged_all_to_all(x, output, offsets, sizes, lands, sizes, group, fcomm.sim)

    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    got = fcomm.simulate(exchange, group)(x, offsets, lands, sizes)
    assert got.tolist() == [[0.0, 1.0, 2.0, 6.0, 0.0], [3.0, 0.0, 0.0, 0.0, 4.0]]
