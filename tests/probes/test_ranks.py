"""Several processes: what is measured before and after gradients are reduced, of shards, and what ranks agree on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rank_workers import BATCH, STAGE, STEPS, everything, loss_of, net, run_ranks, samples
from torch import Tensor

from bifusion_diag.probes import GradsProbe, Monitor, Reading
from bifusion_diag.probes.ranks import Agreement, Shards, agree
from bifusion_diag.record import RecordReader

pytestmark = pytest.mark.slow
OWNERS = ("first", "twice", "norm", "rare", "late", "last", "never")


class Trained(NamedTuple):
    """What all processes of one start have done."""

    world: int
    folder: Path
    results: list[dict[str, Any]]  # by rank

    def series(self, run: str, rank: int) -> dict[str, NDArray[np.float32]]:
        """All series of a record, NaN where missing or NaN."""
        stem = "run" if rank == 0 else f"run.rank{rank}"
        reader = RecordReader(self.folder / run / f"{stem}.record")
        values, _ = reader.columns(reader.names)
        assert reader.steps.tolist() == list(range(STEPS))
        return {name: values[:, i] for i, name in enumerate(reader.names)}


@pytest.fixture(scope="module", params=[2, 4])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("ranks")
    return Trained(request.param, folder, run_ranks(everything, request.param, folder))


class Truth(NamedTuple):
    """Gradient norms of a training in one process, by step."""

    reduced: dict[str, list[float]]  # by module: of the joint batch's gradient
    local: dict[str, list[list[float]]]  # by module: of each rank's own, by rank


def truth(world: int, plain: bool) -> Truth:
    """One process that computes the gradient of every rank's batch by autograd, and averages them."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = Truth({name: [] for name in OWNERS}, {name: [[] for _ in range(world)] for name in OWNERS})
    for step in range(STEPS):
        if step == STAGE and not plain:
            model.late.requires_grad_(True)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in learning.items()}
        used = set()
        for rank, x in enumerate(samples(step, world).split(BATCH)):
            loss = loss_of(model, x, rare=rank == 0 and not plain)
            gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
            here = {name: g.double() for name, g in zip(learning, gradients, strict=True) if g is not None}
            used |= set(here)
            for name, gradient in here.items():
                mean[name] += gradient / world
            for module in OWNERS:
                found.local[module][rank].append(norm_of(here, module))
        for module in OWNERS:
            found.reduced[module].append(norm_of({name: mean[name] for name in used}, module))
        for name, parameter in learning.items():
            parameter.grad = mean[name].float() if name in used else None
        optimizer.step()
    return found


def norm_of(gradients: dict[str, Tensor], module: str) -> float:
    """The norm of a module's own gradients, NaN where it has none."""
    own = [g.flatten() for name, g in gradients.items() if name.rpartition(".")[0] == module]
    return float(torch.cat(own).norm()) if own else np.nan


@pytest.mark.parametrize("run", ["all", "view", "replicated", "sharded"])
def test_after_the_reduction_all_ranks_measure_the_gradient_of_the_joint_batch(trained: Trained, run: str) -> None:
    expected = truth(trained.world, plain=run in ("replicated", "sharded")).reduced
    of_rank_0 = trained.series(run, 0)
    for module in OWNERS:
        np.testing.assert_allclose(of_rank_0[f"grads/{module}/param_norm"], expected[module], rtol=1e-4, err_msg=module)
    for rank in range(1, trained.world):
        series = trained.series(run, rank)
        for module in OWNERS:
            for key in ("param_norm", "state"):
                name = f"grads/{module}/{key}"
                np.testing.assert_array_equal(series[name], of_rank_0[name], err_msg=f"{name} of rank {rank}")


@pytest.mark.parametrize("run", ["all", "view"])
def test_before_the_reduction_each_rank_measures_its_own(trained: Trained, run: str) -> None:
    expected = truth(trained.world, plain=False).local
    for rank in range(trained.world):
        series = trained.series(run, rank)
        for module in OWNERS:
            measured = series[f"grads/{module}/local_norm"]
            # Of rank 1 on, `rare` has no gradient of its own, or the zeros that the reduction leaves in its place.
            np.testing.assert_allclose(measured, expected[module][rank], rtol=1e-4, err_msg=f"{module} of rank {rank}")
    assert "grads/first/local_norm" in {f"grads/first/{key.partition('/')[2]}" for key in GradsProbe.RANK_KEYS}


def test_with_accumulation_each_rank_measures_all_that_it_has_accumulated(trained: Trained) -> None:
    expected = truth(trained.world, plain=True)
    for rank in range(trained.world):
        series = trained.series("accumulated", rank)
        for module in ("first", "twice", "norm", "last"):
            name = f"grads/{module}"
            np.testing.assert_allclose(series[f"{name}/local_norm"], expected.local[module][rank], rtol=1e-4)
            np.testing.assert_allclose(series[f"{name}/param_norm"], expected.reduced[module], rtol=1e-4)


@pytest.mark.parametrize(("watched", "bare"), [("all", "none"), ("view", "none"), ("sharded", "bare")])
def test_training_is_bitwise_the_same_with_all_probes_and_with_none(trained: Trained, watched: str, bare: str) -> None:
    for rank, result in enumerate(trained.results):
        one, other = result[watched], result[bare]
        assert torch.equal(one["random"], other["random"])
        assert not torch.equal(one["random"], trained.results[rank - 1][bare]["random"])
        assert [list(gradients) for gradients in one["gradients"]] == [list(g) for g in other["gradients"]]
        for mine, others in zip(
            [one["weights"], *one["gradients"]], [other["weights"], *other["gradients"]], strict=True
        ):
            assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
        of_rank_0 = trained.results[0][watched]["weights"]
        assert all(torch.equal(one["weights"][name], of_rank_0[name]) for name in of_rank_0)


def test_of_shards_everything_is_measured_as_of_the_whole(trained: Trained) -> None:
    compared = 0
    for rank in range(trained.world):
        replicated, sharded = trained.series("replicated", rank), trained.series("sharded", rank)
        own = {name for name in replicated if name.endswith("/local_norm") or name.startswith("throughput/")}
        assert set(sharded) == set(replicated) - {name for name in own if name.startswith("grads/")}
        for name in set(replicated) - own:
            compared += 1
            np.testing.assert_allclose(sharded[name], replicated[name], rtol=1e-4, atol=1e-7, err_msg=name)
        prefixes = {name.partition("/")[0] for name in sharded}
        assert prefixes >= {"grads", "loss", "weights", "updates", "activations"}
    assert compared > 100


def test_a_nan_of_rank_1_is_found_at_rank_1(trained: Trained) -> None:
    for rank, result in enumerate(trained.results):
        agreed = [Agreement(*agreement) for agreement in result["bad"]["agreed"]]
        assert [a.flags[0] for a in agreed] == [0, 1, 0, 0]
        assert [a.ranks[0] for a in agreed] == [(), (1,), (), ()]
        assert agreed[0].flags[1] == 10 * (trained.world - 1)
        assert agreed[0].ranks[1] == tuple(range(1, trained.world))
        series = trained.series("bad", rank)
        finite = np.isfinite(series["grads/first/local_norm"]).tolist()
        assert finite == ([True, False, True, True] if rank == 1 else [True] * 4)
        assert series["grads/first/state"].tolist() == [3, 4, 3, 3]  # after the reduction it is everybody's


def test_each_rank_records_beside_rank_0_which_alone_writes_run_json(trained: Trained) -> None:
    for run in ("all", "sharded"):
        names = {path.name for path in (trained.folder / run).iterdir()}
        others = {f"run.rank{rank}.record" for rank in range(1, trained.world)}
        assert names == {"run.json", "run.record", "run.tensorboard"} | others
        header = RecordReader(trained.folder / run / "run.rank1.record").state.header
        assert (header.environment["rank"], header.environment["ranks"]) == (1, trained.world)


def test_a_monitor_on_rank_0_alone_waits_for_nobody(trained: Trained) -> None:
    assert trained.series("alone", 0)["grads/first/param_norm"].shape == (STEPS,)
    assert not (trained.folder / "alone" / "run.rank1.record").exists()


def test_alone_nothing_is_sent() -> None:
    assert agree([True, 0, 7]) == Agreement((1, 0, 7), ((0,), (), (0,)))
    shards = Shards(list(net().parameters()))
    norms = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert not shards.any
    assert shards.whole_norms(norms, [0, 5]) is norms


def test_the_error_of_a_probe_that_other_ranks_wait_for_is_passed_on() -> None:
    class Waited(GradsProbe):
        def collect(self) -> Iterator[Reading]:
            raise RuntimeError("broken")

    model = net()
    for shared in (False, True):
        probe = Waited()
        told = pytest.raises(RuntimeError, match="broken") if shared else pytest.warns(RuntimeWarning, match="is off")
        with Monitor(model, None, [probe]) as monitor:
            probe.shared = shared
            with told, monitor.step():
                loss_of(model, torch.zeros(2, 6)).backward()
