"""What an export is made of beside its graphs, and the runner that needs neither torch nor diffusers.

Nothing is imported here, so that `diffpress.export.portable.pipeline` stays light.
"""
