from .classifier import OnnxClassifier as OnnxClassifier
