"""How fast a model would train on the GPU that is there, tried for a moment before its weights are loaded.

Two small models of its shape with random weights, of LAYERS decoder layers each, make a few passes; what the additional layers
take is what every layer takes. The output layer is reckoned by its weights. Layers are as transformers writes them, in 16 bits,
recorded as a CUDA graph where the run records its passes: compiled ones are faster, 4-bit weights are a little slower.
"""

import copy
import statistics
import time
from typing import Any

from sft.settings import Settings

LAYERS = (1, 3)
PASSES = 4
"""Timed after one that is not."""
AGAIN = 0.5
"""What a pass costs more whose layers are all computed again for the backward one, which under LoRA makes one product with a
weight, as the forward pass does."""


def speed(
    settings: Settings, where: str, rows: int, length: int, again: float, recorded: bool = False, device: Any = "cuda"
) -> float:
    """Tokens a second of passes of `rows` rows of `length` tokens, where the share `again` of the layers is computed twice, and
    which are `recorded` and replayed or launched kernel by kernel.

    `where` is the folder or hub id whose config.json says the shape. The random state and the count of peak memory stay as they
    were. Raises what transformers and torch do, torch.OutOfMemoryError among it.
    """
    import torch
    from transformers import AutoConfig

    trusted = settings.model.trust_remote_code
    config = AutoConfig.from_pretrained(where, revision=settings.model.revision, trust_remote_code=trusted)
    text, on_gpu = config.get_text_config(), torch.device(device).type == "cuda"
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            few, more = (_seconds(config, settings, layers, rows, length, recorded, device) for layers in LAYERS)
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    layer, weights = max(more[0] - few[0], 1e-9) / (LAYERS[1] - LAYERS[0]), (more[1] - few[1]) / (LAYERS[1] - LAYERS[0])
    head = layer * text.vocab_size * text.hidden_size / weights
    return rows * length / (layer * text.num_hidden_layers * (1 + AGAIN * again) + head)


def _seconds(
    config: Any, settings: Settings, layers: int, rows: int, length: int, recorded: bool, device: Any
) -> tuple[float, int]:
    """(seconds of a forward and a backward pass without the output layer, weights) of a model with so many layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.model.trust_remote_code)
    weights = sum(p.numel() for p in model.parameters())
    lora = settings.lora
    if lora.enabled:
        targets = lora.target_modules if lora.target_modules != ["all-linear"] else "all-linear"
        options = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules=targets)
        model = get_peft_model(model, options).get_base_model()
    model.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(text.vocab_size, (rows, length), device=device)

    def run() -> None:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.autograd.grad(hidden.sum(), learnt, allow_unused=True)

    run()
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.autograd.set_multithreading_enabled(False), torch.cuda.graph(graph):
            run()
        run = graph.replay
        run()
    times = []
    for _ in range(PASSES):
        if ids.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times), weights
