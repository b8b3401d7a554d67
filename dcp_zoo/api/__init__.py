"""The Python API for one's own images: `FewShotClassifier`, and the functions `train`, `evaluate` and `predict`."""
