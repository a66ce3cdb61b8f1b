"""What the benchmarks' programs share that needs no GPU to be right: names, sums over a profile, rows; on a GPU, that
a captured update is the update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import bench_focal
import bench_linear_focal
import bench_start
import peers
import pytest
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from facefast.data import read_index
from facefast.models import load_source


def event(
    name: str, microseconds: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False
) -> SimpleNamespace:
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


# benchmarks/timing.py


def test_kernels_of_a_profile_are_added_up_without_the_flush_the_host_and_named_spans() -> None:
    events = [
        event("aten::mul", 900.0, DeviceType.CPU),
        event("void at::native::bitwise_not_kernel<...>", 500.0),
        event("stats_kernel", 4.0),
        event("Memset (Device)", 1.0),
        event("forward", 80.0, annotation=True),
        event("gradient_kernel", 7.0),
    ]
    assert timing.device_microseconds(events, 2) == 6.0


def test_a_profile_without_a_kernel_is_no_measurement_of_zero() -> None:
    assert timing.device_microseconds([event("aten::mul", 900.0, DeviceType.CPU)], 2) is None


def test_time_on_the_host_waits_for_the_device_between_calls_and_not_within_them() -> None:
    order: list[str] = []
    found = timing.host_microseconds(lambda: order.append("call"), 3, lambda: order.append("wait"))
    assert order == ["wait", "call"] * 3 + ["wait"] and found > 0


def test_rows_of_the_loss_say_host_and_kernel_time_where_they_were_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = []
    monkeypatch.setattr(bench_focal, "record", lambda name, **row: rows.append(row))
    seconds = {name: [1e-5, 2e-5, 3e-5] for name in ("facefast", "eager", "copy")}
    measured = bench_focal.Measured(seconds, {"facefast": 21.04, "eager": 40.0}, {"facefast": 9.06, "eager": None})
    bench_focal.report(4096, 40, "cuda", torch.bfloat16, measured)
    found = {row["contender"]: (row["host_microseconds"], row["kernel_microseconds"]) for row in rows}
    assert found == {"facefast": (21.0, 9.1), "eager": (40.0, None), "copy": (None, None)}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("facefast ")]
    assert line.split()[5:7] == ["21.0", "9.1"]


# benchmarks/peers.py


def test_captured_loops_are_contenders_of_a_gpu_and_left_out_with_words_elsewhere() -> None:
    graphs = {
        f"{loader}, {loop} and captured" for loader in ("in memory", "DALI stock") for loop in ("eager", "compiled")
    }
    assert graphs <= set(peers.PEERS) and len(set(peers.PEERS)) == len(peers.PEERS)
    assert {name for name, why in peers.left_out("cpu").items() if why == "needs a GPU"} == graphs
    assert not graphs & set(peers.left_out("cuda"))
    assert all(name.rpartition(", ")[2] in (*peers.LOOPS, *peers.CAPTURED) for name in peers.PEERS)
    assert set(peers.CAPTURED.values()) == set(peers.LOOPS)


def trained(device: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """An update of a small network, and two batches."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    labels = torch.arange(16, device=device) % 5

    def update(batch: Tensor) -> Tensor:
        loss = F.cross_entropy(model(batch), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    first, second = torch.randn(2, 16, 3, 8, 8, device=device)
    return update, first, second


@pytest.mark.gpu
def test_a_captured_update_trains_as_the_update_does_and_on_the_batch_it_is_given() -> None:
    update, first, second = trained("cuda")
    wanted = [update(batch).item() for batch in (*[first] * peers.WARM_UP, first, second, first)]
    update, first, second = trained("cuda")
    replay = peers.captured(update, first)
    found = [replay(batch).item() for batch in (first, second, first)]
    assert found == pytest.approx(wanted[peers.WARM_UP :], rel=1e-5)


@pytest.mark.gpu
def test_kernels_take_no_longer_than_the_events_around_them() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    kernels = timing.kernel_microseconds(lambda: x.mul(2), 10)
    assert kernels is None or 0 < kernels < 1e6 * timing._on_gpu(lambda: x.mul(2), 10) + 50


# benchmarks/bench_linear_focal.py


def test_heads_that_know_no_margin_say_so_by_name_and_ours_keep_or_do_not() -> None:
    assert all(name.endswith("plain softmax without margin") for name in bench_linear_focal.PLAIN)
    assert {"fused", "kept", "chosen"} <= set(bench_linear_focal.contenders(1 << 33))
    assert not set(bench_linear_focal.PLAIN) & set(bench_linear_focal.contenders(1 << 33))


def test_a_foreign_head_that_fails_is_left_out_with_its_reason_and_ours_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        raise RuntimeError("no such GPU")

    name = next(iter(bench_linear_focal.PLAIN))
    assert list(bench_linear_focal.running({"fused": int, name: fails})) == ["fused"]
    assert f"{name}: not run: RuntimeError: no such GPU" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such GPU"):
        bench_linear_focal.running({"fused": fails})


def test_a_measured_shape_is_a_line_of_the_table_that_chooses() -> None:
    from facefast.ops.linear_focal import Measured

    line = bench_linear_focal.table_line(
        (4096, 512, 10177), {"fused": [9e-4, 1e-3, 2e-3], "kept": [1.5e-3]}, {"fused": 58.64, "kept": 173.0}
    )
    assert line == "Measured(4096, 10_177, 1.000, 1.500, 58.6, 173.0),"
    assert eval(line.rstrip(","), {"Measured": Measured}) == Measured(4096, 10177, 1.0, 1.5, 58.6, 173.0)


# benchmarks/bench_start.py


def test_drawn_faces_come_with_a_source_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_start, "IDENTITIES", 2)
    data, source = bench_start.draw(tmp_path)
    assert read_index(data).num_classes == 2 and "backbone" in next(iter(load_source(str(source)).state))


def test_a_start_is_recorded_with_its_end_where_rounds_went_so_far() -> None:
    rounds = [{"seconds": s, "cpu_seconds": 2 * s, "pictures": 7} for s in (3.0, 1.0, 2.0)]
    row = bench_start.row_of(rounds, "drawn", "")
    assert (row["seconds"], row["lowest"], row["highest"], row["cpu_seconds"]) == (2.0, 1.0, 3.0, 4.0)
    assert row["options"] == "none" and row["rounds"] == 3 and "end_seconds" not in row
    whole = bench_start.row_of([{**each, "end_seconds": 10 * each["seconds"]} for each in rounds], "drawn", "--x")
    assert (whole["end_seconds"], whole["end_lowest"], whole["end_highest"]) == (20.0, 10.0, 30.0)
