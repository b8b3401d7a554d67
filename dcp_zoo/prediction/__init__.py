"""The one road from images to answers: decode, encode, classify, reject; by PyTorch or ONNX Runtime."""
