import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline

d, photos = sys.argv[1:3]
m = ORTModelForImageClassification.from_pretrained(d)
p = AutoImageProcessor.from_pretrained(d)
c = pipeline("image-classification", model=m, image_processor=p)
print(json.dumps({f.name: c(str(f), top_k=None) for f in sorted(Path(photos).iterdir())}))
