from .onnx_classifier import OnnxClassifier as OnnxClassifier
from .quantize import calibration as calibration
