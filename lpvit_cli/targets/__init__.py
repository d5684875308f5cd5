"""What runs a model: torch, onnxruntime, openvino."""
