"""vLLM is imported once, with torch's own deprecations unheard: in the tests, warnings are errors."""

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.lora.layers
    import vllm.lora.punica_wrapper.punica_cpu  # noqa: F401 - both for the tests beside this file

torch.set_num_threads(1)  # these matrices are tiny: threads would only wait for each other
