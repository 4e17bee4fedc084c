"""fcomm.testing from a user's view: the walk through notes/adding-a-collective.md, and the strategies."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fcomm
from fcomm.testing import Case, check_case, check_collective, strategies

CASE = Case("all_reduce", "", fcomm.all_reduce, lambda size: (3,))
NOTE = Path(__file__).parent.parent / "notes" / "adding-a-collective.md"
QUICK = settings(
    deadline=None, database=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)  # fmt: skip


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module that the note's code blocks make, importable by the processes of a check."""
    folder = tmp_path_factory.mktemp("package")
    blocks = re.findall(r"```python\n(.*?)```", NOTE.read_text(), re.DOTALL)
    (folder / "group_logsumexp_of_the_note.py").write_text("\n\n".join(blocks))
    sys.path.insert(0, str(folder))
    return importlib.import_module("group_logsumexp_of_the_note")


def test_the_note_on_adding_a_collective_works_as_printed(walked: ModuleType) -> None:
    walked.check_numbers()
    walked.check_everywhere()


def test_its_collective_also_composes_at_infinity(walked: ModuleType) -> None:
    world, inf = fcomm.init(), float("inf")
    x = torch.tensor([-inf, inf, 0.0])
    assert walked.group_logsumexp(x, world, fcomm.c10d).tolist() == [-inf, inf, 0.0]
    with pytest.raises(TypeError, match=r"group_logsumexp: x is torch.int64; pass a real floating point tensor"):
        walked.group_logsumexp(torch.ones(2).long(), world, fcomm.c10d)


def test_check_collective_says_what_it_cannot_check() -> None:
    with pytest.raises(ValueError, match=r"recv takes .*; write a Case with a call of its own"):
        check_collective("recv", fcomm.sim, 2)


@pytest.mark.parametrize(("name", "params"), [("ppermute", {"perm": [0, 1, 1, 2, 2, 0]}), ("gather", {"dst": 2})])
def test_check_collective_takes_parameters(name: str, params: dict[str, object]) -> None:
    check_collective(name, fcomm.sim, 3, params=params, transforms=("forward", "vjp", "vmap"))


# --- strategies ---------------------------------------------------------------------------------------------------


@given(st.data())
@QUICK
def test_views_are_the_contiguous_tensor(data: st.DataObject) -> None:
    """Every collective of equal shapes, on any dtype, values and layout, gives the result for the contiguous copy."""
    group = data.draw(strategies.groups())
    shape = data.draw(strategies.shapes(2, 3, smallest_ndim=1))
    x = data.draw(strategies.tensors((group.size, *shape)))
    perm = data.draw(strategies.perms(group.size))
    dim = data.draw(strategies.dims(len(shape)))
    for fn in (
        lambda x: fcomm.ppermute(x, group, fcomm.sim, perm=perm),
        lambda x: fcomm.all_gather(x, group, fcomm.sim, dim=dim),
        lambda x: fcomm.all_reduce(x, group, fcomm.sim),
    ):
        y, z = (fcomm.simulate(fn, group)(v) for v in (x, x.resolve_conj().resolve_neg().contiguous()))
        y, z = (v.resolve_conj().resolve_neg().contiguous().view(torch.uint8) for v in (y, z))
        assert torch.equal(y, z)


@given(strategies.tensors())
@QUICK
def test_tensors_are_of_the_kind_drawn(x: torch.Tensor) -> None:
    assert x.dtype in strategies.DTYPES
    assert x.dim() <= 3


def test_every_layout_and_dtype_is_drawn() -> None:
    seen: set[object] = set()

    @given(strategies.tensors(shape=(2, 3)))
    @settings(QUICK, max_examples=500)
    def look(x: torch.Tensor) -> None:
        seen.add(x.dtype)
        seen.update(name for name, has in FEATURES.items() if has(x))

    look()
    assert set(strategies.DTYPES) | set(FEATURES) <= seen


FEATURES = {
    "contiguous": lambda x: x.is_contiguous(),
    "transposed": lambda x: x.stride() == (1, 2),
    "gaps": lambda x: x.stride() == (6, 2),
    "offset": lambda x: x.storage_offset() == 3,
    "expanded": lambda x: x.stride() == (0, 0),
    "overlapping": lambda x: x.stride() == (1, 1),
    "conjugate": lambda x: x.is_conj(),
    "negative": lambda x: x.is_neg(),
    "nan": lambda x: x.dtype in strategies.FLOATS and bool(x.isnan().any()),
}


@given(st.data())
@QUICK
def test_sizes_routes_and_perms_are_valid(data: st.DataObject) -> None:
    size = data.draw(strategies.sizes())
    perm = data.draw(strategies.perms(size))
    for ranks in zip(*perm, strict=True):
        assert len(set(ranks)) == len(ranks)
        assert set(ranks) <= set(range(size))
    assert len(data.draw(strategies.perms(size, partial=False))) == size
    lengths = data.draw(strategies.block_sizes(size, smallest_total=2))
    assert len(lengths) == size
    assert sum(lengths) >= 2
    rows, (starts, sends, landing, receives) = data.draw(strategies.routes(size, 3))
    assert torch.equal(sends.T, receives)
    assert bool((starts + sends <= 3).all())
    for r in range(size):
        received = [p for s in range(size) for p in range(landing[s, r], landing[s, r] + sends[s, r])]
        assert len(set(received)) == len(received)
        assert all(0 <= p < rows for p in received)


@pytest.mark.parametrize(
    ("what", "options", "text"),
    [
        ("all_reduse", {}, "no collective is named 'all_reduse'; import the module that defines it"),
        ("all_reduce", {"params": {"opp": "sum"}}, r"params has \['opp'\] for all_reduce; choose among op"),
        (
            "all_reduce",
            {"transforms": ("forwrd",)},
            r"transforms has \['forwrd'\] for all_reduce; choose among forward",
        ),
        ("all_reduce", {"values": "tie"}, r"values has \['tie'\] for all_reduce; choose among normal, ties, zeros"),
        (
            "all_reduce",
            {"transforms": ()},
            "nothing of all_reduce would be checked by .*; choose among forward",
        ),
        (
            "all_reduce",
            {"transforms": ("vjp",), "dtype": torch.int32},
            "nothing of all_reduce would be checked .*; torch.int32 has no derivative",
        ),
    ],
)
def test_check_collective_names_what_it_does_not_know(what: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_collective(what, fcomm.sim, 2, **options)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"case": "all_reduce"}, TypeError, "case is 'all_reduce'; pass a Case, or call check_collective"),
        ({"backend": "sim"}, TypeError, "backend is 'sim'; pass a Backend, such as"),
        ({"group": "i"}, TypeError, "group is 'i'; pass a Group, from"),
        ({"backend": fcomm.cpu}, fcomm.FcommError, "group 'i' is a simulated axis, which backend 'cpu' cannot serve"),
        ({"transforms": ["forwrd"]}, ValueError, r"transforms has \['forwrd'\] for all_reduce; choose among forward"),
        ({"transforms": "vjp"}, TypeError, "transforms is 'vjp'; pass a list of names"),
        (
            {"case": replace(CASE, values="tie")},
            ValueError,
            r"values has \['tie'\] for all_reduce; choose among normal",
        ),
    ],
)
def test_check_case_names_what_it_cannot_take(options: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match="check_case: " + text):
        check_case(**{"case": CASE, "backend": fcomm.sim, "group": fcomm.axis("i", 2), **options})


def test_check_collective_names_a_backend_that_is_none() -> None:
    with pytest.raises(TypeError, match="check_collective: backend is 'sim'; pass a Backend"):
        check_collective("all_reduce", "sim", 2)


def test_strategies_say_that_hypothesis_is_missing() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import fcomm.testing; import fcomm.testing.strategies"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    last = said.stderr.strip().splitlines()[-1]
    assert last == "ImportError: fcomm.testing.strategies needs hypothesis; pip install 'fcomm[test]'"
