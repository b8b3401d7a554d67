"""Exports heads to ONNX files, which `OnnxClassifier` reads without torch and CLIP."""

from dcp_zoo.prediction.onnx import OnnxClassifier

__all__ = ["OnnxClassifier"]
