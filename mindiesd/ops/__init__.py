"""The documented layer functions, one operator a file, usable without any patching.

Everything here is plain PyTorch calling a backend (:mod:`mindiesd.ops.backends`); nothing knows of
patches, diffusers or transformers. The patch engine replaces ``F.scaled_dot_product_attention``,
``F.rms_norm`` and the norm modules' ``forward`` by shims that call in here, so no module of this
package may call those names: the ATen functions below them are called instead.
"""
