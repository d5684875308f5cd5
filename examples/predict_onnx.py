"""The class of each image by an exported file, without lpvit: python predict_onnx.py MODEL.onnx IMAGE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
config = json.loads(session.get_modelmeta().custom_metadata_map["lpvit"])["preprocessing"]
_, height, width = config["input_size"]
assert config.get("crop_mode", "center") == "center", "lpvit predict knows the other ones"
for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB")
    scale = max(int(height / config["crop_pct"]) / image.height, int(width / config["crop_pct"]) / image.width)
    size = [int(scale * side + 1e-6) for side in image.size]  # as large as the crop needs, whose middle is cut out
    image = image.resize(size, Image.Resampling[config["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    x = ((pixels - config["mean"]) / config["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    best = int(session.run(None, {"images": x})[0][0].argmax())
    print(path, best, (config.get("label_names") or {best: ""})[best])
