"""Whatever the metadata says, a file is accepted or refused by an error of ours: never another exception."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.backends.fake import FakeBackend
from hybrid.errors import HybridError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType
from hybrid.models.compat import TABLE
from hybrid.models.registry import family_of
from hybrid.models.weights import WeightCheck
from hybrid.placement.planner import plan

VALUES = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([0, 1, 2, 3, 7, 8, 16, 1 << 20]),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(0, 200), min_size=1, max_size=4).map(
        lambda values: np.array(values, dtype=np.int32)
    ),
)
REMOVED = object()


def check(path) -> None:
    """All that loading proves before it reads weights."""
    with GGUFFile.open(path, header_only=True) as file:
        family = family_of(file)
        config = family.read_config(file)
        weights = WeightCheck(file, plan(file), {"cpu": FakeBackend("cpu")})
        family.load(config, weights, 1)
        weights.finish(config.num_layers)


@pytest.fixture
def check_changed(make_reference, tmp_path):
    contents = {
        variant: make_reference(variant).contents(variant == "v3") for variant in ("v2-groups-yarn", "v3")
    }

    def attempt(variant, changes) -> None:
        keys, tensors = contents[variant]
        keys = keys | {f"deepseek2.{name}": value for name, value in changes.items()}
        path = tmp_path / "model.gguf"
        with GGUFWriter(path, header_only=True) as writer:
            writer.add_metadata("general.architecture", "deepseek2")
            for key, value in keys.items():
                if value is not REMOVED:
                    kind = ValueType.FLOAT32 if isinstance(value, float) else None
                    writer.add_metadata(key, value, kind)
            for name, values in tensors.items():
                writer.add_tensor(name, values.shape, GGMLType.F32)
        check(path)

    attempt.names = sorted(
        {key.removeprefix("deepseek2.") for keys, _ in contents.values() for key in keys} | {*TABLE}
    )
    return attempt


def test_unchanged_headers_pass(check_changed):
    check_changed("v3", {})
    check_changed("v2-groups-yarn", {})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_metadata(check_changed, data):
    names = st.sampled_from(check_changed.names)
    changes = data.draw(st.dictionaries(names, VALUES | st.just(REMOVED), min_size=1, max_size=3))
    with contextlib.suppress(HybridError):
        check_changed(data.draw(st.sampled_from(["v3", "v2-groups-yarn"])), changes)
