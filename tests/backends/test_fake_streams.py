"""Streams of the test device: CUDA's rules, and nonsense wherever nothing has been computed."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from hybrid.backends.fake_streams import FakeOptions, FakeRuntime
from hybrid.backends.streams import hand_over, on_streams
from hybrid.errors import DeviceError

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture
def make():
    """``make(name, **options)`` -> a runtime; closed at the end."""
    made: list[FakeRuntime] = []

    def make_(name: str = "fakegpu:0", **options) -> FakeRuntime:
        made.append(FakeRuntime(name, FakeOptions(**options)))
        return made[-1]

    yield make_
    for runtime in made:
        runtime.close()


def slow(runtime: FakeRuntime, stream: str = "main") -> None:
    """It works when the host waits, and not before."""
    runtime.options.slow = f"{runtime.name} {stream}"


def to_device(runtime: FakeRuntime, values: torch.Tensor) -> torch.Tensor:
    out = runtime.empty(values.shape, values.dtype)
    runtime.copy(out, values)
    return out


def test_a_result_holds_nonsense_until_its_stream_has_run(make):
    runtime = make()
    slow(runtime)
    for dtype, is_nonsense in [
        (torch.float32, lambda x: x.isnan().all()),
        (torch.bfloat16, lambda x: x.isnan().all()),
        (torch.int32, lambda x: (x > 1 << 30).all()),
        (torch.uint8, lambda x: (x == 255).all()),
    ]:
        x = to_device(runtime, torch.ones(3, dtype=dtype))
        assert not x.is_cpu
        assert is_nonsense(x.numbers)
        assert x.tolist() == [1, 1, 1]


def test_operations_of_torch_are_queued_and_views_share_memory(make):
    runtime = make(max_delay_s=1e-3)
    x = to_device(runtime, torch.arange(12.0).view(3, 4))
    view = x.view(4, 3)[1:, :2]
    view.add_(100)
    total = x.sum(-1)
    chosen = x[torch.tensor([2, 0])].to(torch.bfloat16)
    reference = torch.arange(12.0).view(3, 4)
    reference.view(4, 3)[1:, :2].add_(100)
    assert torch.equal(total.cpu(), reference.sum(-1))
    assert torch.equal(chosen.cpu(), reference[[2, 0]].bfloat16())
    assert int(x.argmax()) == int(reference.argmax())


def test_tensors_of_the_host_and_of_other_devices_do_not_mix(make):
    one, two = make("fakegpu:0"), make("fakegpu:1")
    x = to_device(one, torch.ones(3))
    with pytest.raises(RuntimeError, match="add: expected tensors of one device, found one of the host"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"add: expected tensors of one device, found .*fakegpu:1"):
        x + to_device(two, torch.ones(3))
    with pytest.raises(RuntimeError, match="copy_: expected equal types"):
        one.copy(x, torch.ones(3, dtype=torch.float64))


def test_pageable_memory_is_read_at_once_and_pinned_memory_when_it_is_copied(make):
    runtime = make()
    slow(runtime)
    pageable, pinned = torch.ones(2), runtime.pinned((2,), torch.float32)
    assert pinned.isnan().all()
    pinned.fill_(1)
    one, two = to_device(runtime, pageable), to_device(runtime, pinned)
    pageable.fill_(2)
    pinned.fill_(2)
    assert one.tolist() == [1, 1]
    assert two.tolist() == [2, 2]


def test_streams_are_ordered_by_events_alone(make):
    runtime = make()
    slow(runtime)
    side = runtime.stream("side")
    x = to_device(runtime, torch.ones(2))
    with runtime.on(side):
        early = x + 1
        side.wait(runtime.main.record(), "test")
        late = x + 1
        assert early.isnan().all().tolist() is True
        assert late.tolist() == [2, 2]


def test_freed_memory_goes_to_later_work(make):
    runtime = make()
    x = to_device(runtime, torch.ones(2))
    numbers, count = x.numbers, runtime.num_tensors
    view = x[:1]
    del x
    gc.collect()
    runtime.synchronize()
    assert numbers.tolist() == [1, 1]  # a view is left
    del view
    gc.collect()
    runtime.synchronize()
    assert numbers.isnan().all()
    assert runtime.num_tensors == count - 1


def test_what_is_handed_over_may_be_dropped(make):
    one, two = make("fakegpu:0"), make("fakegpu:1")
    slow(two)
    lanes = {one: one.stream("a"), two: two.main}
    with on_streams(lanes):
        out = hand_over(to_device(one, torch.ones(2)), one, two)
    assert out.tolist() == [1, 1]


def test_a_graph_repeats_its_work_on_what_its_inputs_hold(make):
    runtime = make(max_delay_s=5e-4)
    stream, side = runtime.stream("step"), runtime.stream("side")
    source, result = runtime.pinned((2,), torch.float32), runtime.pinned((2,), torch.float32)
    seen: list[int] = []
    note = CALLBACK(lambda argument: seen.append(argument or 0))
    source.fill_(7)
    with runtime.capture(stream) as graph:
        x = to_device(runtime, source)
        side.wait(stream.record(), "fork")
        with runtime.on(side):
            y = x * 2
            side.call(ctypes.cast(note, ctypes.c_void_p).value or 0, 5, "call")
        stream.wait(side.record(), "join")
        runtime.copy(result, y + x)
    assert result.isnan().all()  # nothing has run
    for value in (1, 2, 3):
        source.fill_(value)
        graph.replay()
        stream.record().synchronize("test")
        assert result.tolist() == [3 * value] * 2
        result.fill_(0)
    assert seen == [5, 5, 5]


def test_the_rules_of_a_capture(make):
    runtime = make()
    stream, side = runtime.stream("step"), runtime.stream("side")
    x = to_device(runtime, torch.ones(2))
    before = runtime.main.record()
    unjoined = "work of stream 'side' was not waited for before the end"
    with pytest.raises(DeviceError, match=unjoined), runtime.capture(stream):
        side.wait(stream.record(), "fork")
        with runtime.on(side):
            torch.add(x, 1)
    for match, action in [
        ("cannot be waited for by the host", lambda: stream.record().synchronize("here")),
        ("a captured stream cannot wait for an event from before", lambda: stream.wait(before, "here")),
        ("the host cannot wait for fakegpu:0 within a capture", lambda: x.sum().item()),
        ("upload: the host cannot wait", lambda: runtime.copy(x, torch.ones(2))),
        ("another one is under way", lambda: runtime.capture(side).__enter__()),
    ]:
        with pytest.raises(DeviceError, match=match), runtime.capture(stream):
            action()
    assert x.tolist() == [1, 1]  # it works as before


def test_failed_work_is_told_when_the_host_waits(make):
    runtime = make()
    x = to_device(runtime, torch.ones(2))

    def broken() -> None:
        raise ValueError("broken kernel")

    runtime.launch("broken", broken)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"fakegpu:0: broken on stream 'main' failed: ValueError"):
            x.tolist()
    with pytest.raises(DeviceError, match="load the model again"):
        runtime.synchronize()


def test_discarded_memory_is_nonsense(make):
    runtime = make()
    pinned, x = runtime.pinned((2,), torch.int32), to_device(runtime, torch.ones(2))
    pinned.fill_(1)
    runtime.discard(pinned)
    runtime.discard(x)
    runtime.synchronize()
    assert (pinned > 1 << 30).all()
    assert x.isnan().all()
