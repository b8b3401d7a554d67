from .onnx_classifier import OnnxClassifier as OnnxClassifier
from .quantize import calibration as calibration
from .web import export_web as export_web
