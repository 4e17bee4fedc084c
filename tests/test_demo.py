"""The demo: the parallel model equals the dense one, the command succeeds, and a wrong model does not pass."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch

import fcomm
from fcomm.demo import report, text
from fcomm.demo.__main__ import main
from fcomm.demo.model import Model, dense_loss, init, parallel_loss, part
from fcomm.demo.train import Run, count_collectives, start, train_step

TINY = Model(blocks=1, width=48, hidden=48, sequence=24, batch=2)
COMMAND = ["--tiny", "--steps", "2", "--compiler"]


def _batch():
    return next(text.batches(TINY.batch, TINY.sequence, seed=1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parallel_model_is_the_dense_model(ranks):
    params = {name: p.double() for name, p in init(TINY, seed=1).items()}
    batch, tp = _batch(), fcomm.axis("tp", ranks)
    value, grads = _value_and_grads(partial(dense_loss, model=TINY), params, batch)
    parts = [part(params, r, ranks) for r in range(ranks)]
    stacked = {name: torch.stack([p[name] for p in parts]) for name in params}
    loss = partial(parallel_loss, model=TINY, tp=tp, backend=fcomm.sim)
    values, parallel = fcomm.simulate(lambda p: _value_and_grads(loss, p, batch), tp)(stacked)
    for rank in range(ranks):
        torch.testing.assert_close(values[rank], value, rtol=1e-10, atol=0.0)
        for name, expected in part(grads, rank, ranks).items():
            torch.testing.assert_close(parallel[name][rank], expected, rtol=1e-9, atol=1e-12, msg=name)


def _value_and_grads(loss, params, batch):
    grads, value = torch.func.grad_and_value(loss)(params, *batch)
    return value, grads


def test_collectives_are_the_textbook_count():
    tp = fcomm.axis("tp", 2)
    loss = partial(parallel_loss, model=TINY, tp=tp, backend=fcomm.sim)
    forward, backward = count_collectives(loss, part(init(TINY, seed=1), 0, 2), *_batch())
    # Two pairs in the block, one all_gather before the logits, one reduce_scatter after the embedding, and the
    # cross-entropy's two; backward each becomes the other, and replicated norms and positions add up.
    assert forward == Counter(all_gather=3, reduce_scatter=3, all_reduce=1, all_reduce_invariant=1)
    assert backward == Counter(all_gather=3, reduce_scatter=3, all_reduce_invariant=2, all_gather_invariant=1)


def _losses(step, state, steps):
    losses, batch = [], _batch()
    for _ in range(steps):
        state, loss = step(state, *batch)
        losses.append(loss.reshape(-1)[0].item())
    return losses


def test_a_wrong_model_does_not_pass():
    tp, parts = fcomm.axis("tp", 2), [part(init(TINY, seed=1), r, 2) for r in range(2)]
    state = start({name: torch.stack([p[name] for p in parts]) for name in parts[0]})
    state["step"] = torch.zeros(2)

    def losses(loss):
        step = train_step(partial(loss, model=TINY, tp=tp, backend=fcomm.sim))
        return Run(_losses(lambda s, *batch: fcomm.simulate(lambda s: step(s, *batch), tp)(s), state, 3))

    def planted(params, tokens, target, **handles):
        # Gradients as they are without the sum over the ranks that the other model's pvary makes.
        whole = parallel_loss(params, tokens, target, **handles)
        norm = params["norm"] + (params["norm"].sum() * 0.1 - params["norm"].sum().detach() * 0.1)
        return whole + (norm - params["norm"]).sum()

    dense = Run(_losses(train_step(partial(dense_loss, model=TINY)), start(init(TINY, seed=1)), 3))
    assert report.passed(dense, losses(parallel_loss))
    assert not report.passed(dense, losses(planted))


def test_verdict():
    good = Run([1.0, 2.0])
    assert report.passed(good, Run([1.0, 2.0001]))
    assert not report.passed(good, Run([1.0, 2.001]))
    assert not report.passed(good, Run([1.0, float("nan")]))
    assert not report.passed(good, Run([1.0, 2.0], graph_breaks=1))


def _run(command, folder, **environment):
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def test_command(tmp_path):
    done = _run([sys.executable, "-m", "fcomm", "demo", *COMMAND, "aot_eager", "--plot", "loss.png"], tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("step 1/2", "ranks on cpu", "graph breaks", "tokens per second", "passed"):
        assert expected in done.stdout
    assert "the train step is 1 graph" in done.stdout
    picture = tmp_path / "loss.png"
    if "no picture" not in done.stdout:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long  # test_rendezvous.py has a program under torchrun in make test, too
def test_command_under_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run([*torchrun, "-m", "fcomm.demo", *COMMAND, "eager", "--backend", "c10d"], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") == 1


@pytest.mark.long
@pytest.mark.parametrize("options", [["--backend", "sim"], ["--ranks", "3", "--backend", "c10d"], ["--ranks", "1"]])
def test_command_compiled(tmp_path, options):
    done = _run([sys.executable, "-m", "fcomm.demo", "--tiny", "--steps", "3", *options], tmp_path)
    assert done.returncode == 0, done.stderr


def test_impossible_ranks_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--ranks", "5"])
    assert end.value.code == 2
    assert "--ranks 5 does not divide the model's 12 (heads)" in capsys.readouterr().err
