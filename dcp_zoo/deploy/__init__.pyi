from .onnx_classifier import OnnxClassifier as OnnxClassifier
from .web import export_web as export_web
