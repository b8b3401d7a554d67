"""Print the probabilities of images by transformers and optimum: `python pipeline.py REPO IMAGE ...`."""

import json
import sys
from importlib.metadata import version

from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline

repo, *images = sys.argv[1:]
model = ORTModelForImageClassification.from_pretrained(repo, file_name="model.onnx", subfolder="onnx")
processor = AutoImageProcessor.from_pretrained(repo)
classify = pipeline("image-classification", model=model, image_processor=processor)
rows = classify(images, top_k=len(model.config.id2label))
print(", ".join(f"{name} {version(name)}" for name in ("transformers", "optimum", "optimum-onnx", "onnxruntime")))
print(json.dumps([{answer["label"]: answer["score"] for answer in row} for row in rows]))
