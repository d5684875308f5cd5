"""The class of each image by an exported file, without lpvit: python predict_onnx.py MODEL.onnx IMAGE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
config = json.loads(session.get_modelmeta().custom_metadata_map["lpvit"])["preprocessing"]
_, height, width = config["input_size"]
for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB")
    shorter = int(height / config["crop_pct"])  # the shorter side is resized, the middle cut out
    size = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(size, Image.Resampling[config["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    x = ((pixels - config["mean"]) / config["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    best = int(session.run(None, {"images": x})[0][0].argmax())
    print(path, best, config.get("label_names", {best: ""})[best])
