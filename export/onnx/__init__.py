"""A pipeline as ONNX graphs: traced, translated, laid out by passes, and checked against torch.

Nothing is imported here: this folder needs torch and onnxscript; `export_onnx` is the way in.
"""
