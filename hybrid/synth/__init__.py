"""Random-weight model files of real shapes, for measuring a machine without the weights."""

from hybrid.synth.presets import PRESETS, KvBLayout, ModelShape, resolve_shape
from hybrid.synth.tensors import Formats
from hybrid.synth.write import SynthReport, synthesise

__all__ = ["PRESETS", "Formats", "KvBLayout", "ModelShape", "SynthReport", "resolve_shape", "synthesise"]
