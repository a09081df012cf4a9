"""ONNX graphs of a whole pipeline, and the runner that needs neither torch nor diffusers.

Nothing is imported here, so that `diffpress.export.onnx.run` stays light; `export.export_onnx` is the way in.
"""
