"""The name diffusers knows us by."""

METHOD = "diffpress"
