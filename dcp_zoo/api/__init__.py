"""The Python API for your own images: `FewShotClassifier`, and the functions `train`, `evaluate` and
`predict`."""

__all__: list[str] = []
