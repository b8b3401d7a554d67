from .onnx_classifier import OnnxClassifier as OnnxClassifier
