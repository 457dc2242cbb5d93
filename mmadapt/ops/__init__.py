from mmadapt.ops._swiglu_adapter import swiglu_adapter
