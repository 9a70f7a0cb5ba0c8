"""The other doors to attention: flash_attn, xformers and sageattention, in the user's own code.

None of these packages can be installed on a machine without CUDA. There, the user's code imports
the modules of this package under their names; where one is installed, its functions are redirected
for tensors that are not on a CUDA device. Installed libraries never see what is provided here: what
diffusers or transformers find out about the machine stays true.
"""
