"""The adapter alone as a GGUF file, for `llama-cli --lora`: the layers' low-rank matrices under llama.cpp's names.

The format is llama.cpp's (docs/development in ggml-org/llama.cpp, and its loader llama-adapter.cpp): `general.type` adapter,
`adapter.type` lora, `adapter.lora.alpha`, and for each weight two tensors, `<name>.lora_a` and `<name>.lora_b`.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from sft.errors import ExportError, first_line


def write_adapter(adapter: Path, merged: Path, whole: Path, target: Path, tied: bool) -> int:
    """Write the adapter in the folder `adapter` to the file `target`; returns how many layers it has.

    `merged` is the merged model's folder and `whole` the GGUF file that llama.cpp's converter made of it: from the two it is
    seen, layer by layer, under which name and in which order of rows the converter keeps a weight, and that no other change
    was made to it; `tied` says that the base's output layer and its embeddings are one weight, which llama.cpp keeps once.
    Raises ExportError where a layer was changed, or the adapter holds what llama.cpp's format cannot.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, get_tensor_name_map
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    matrices = load_file(adapter / "adapter_model.safetensors")
    _refuse_unknown_parts(config, matrices, tied)
    reader = GGUFReader(whole)
    arch = reader.fields["general.architecture"].contents()
    blocks = int(reader.fields[f"{arch}.block_count"].contents())
    heads = [int(reader.fields[f"{arch}.attention.{key}"].contents()) for key in ("head_count", "head_count_kv")]
    names = get_tensor_name_map(next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch), blocks)
    held = {tensor.name: tensor for tensor in reader.tensors}
    weights = _open_weights(merged)
    # llama.cpp multiplies by alpha / r; rank-stabilised LoRA divides by the root of r (arXiv 2312.03732).
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1.0)
    writer = GGUFWriter(target, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    modules = sorted({key.rsplit(".lora_A.", 1)[0] for key in matrices if ".lora_A." in key})
    for module in modules:
        path = module.removeprefix("base_model.model.")
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name not in held:
            raise ExportError(f"llama.cpp's converter has no weight for the layer {path}, so its adapter cannot be kept alone")
        order = _row_order(weights(f"{path}.weight"), held[name], heads)
        if order is None:
            raise ExportError(f"llama.cpp's converter changes the layer {path}, so its adapter cannot be kept alone")
        writer.add_tensor(f"{name}.lora_a", matrices[f"{module}.lora_A.weight"].float().contiguous().numpy())
        b = matrices[f"{module}.lora_B.weight"].float()[order] * _scale_beside(config, path, alpha)
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:  # numpy's says how many bytes were written, and not that the disk is full
        raise ExportError(f"the adapter could not be written, as on a full disk: {first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # what is left in its buffer does not fit either
            writer.close()
    return len(modules)


def _scale_beside(config: dict[str, Any], path: str, alpha: float) -> float:
    """What PEFT multiplies the update of a layer by, beside the alpha / rank of llama.cpp: 1, but for layers of other ranks or
    alphas than the rest."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    rank = ranks.get(get_pattern_key(ranks, path), config["r"])
    own = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
    return own / (math.sqrt(rank) if config.get("use_rslora") else rank) * rank / alpha


def _refuse_unknown_parts(config: dict[str, Any], matrices: dict[str, Any], tied: bool) -> None:
    parts = {"use_dora": "DoRA's magnitudes", "modules_to_save": "whole modules beside the adapter"}
    found = [what for key, what in parts.items() if config.get(key)]
    found += ["adapters on experts"] if config.get("target_parameters") else []
    found += ["trained tokens"] if config.get("trainable_token_indices") else []
    found += ["trained bias terms"] if config.get("bias", "none") != "none" else []
    found += ["a layer of embeddings"] if any(".lora_embedding_A" in key for key in matrices) else []
    found += ["a tied output layer"] if tied and any(key.endswith(".lm_head.lora_A.weight") for key in matrices) else []
    if found:
        raise ExportError(f"a GGUF adapter has no place for {' and '.join(found)}; the merged GGUF files hold them")


def _open_weights(merged: Path) -> Any:
    """A function that reads one tensor of a merged folder by its name, as float32."""
    from safetensors import safe_open

    index = merged / "model.safetensors.index.json"
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}

    def read(name: str) -> Any:
        with safe_open(merged / places.get(name, "model.safetensors"), framework="pt") as file:
            return file.get_tensor(name).float()

    return read


def _row_order(weight: Any, tensor: Any, heads: list[int]) -> Any:
    """The order of rows in which the GGUF file keeps `weight`, or None if it is not a matter of order.

    Llama's rotary layers keep the two halves of each head's rows in turn; every other layer keeps them as they are.
    """
    import torch
    from gguf.quants import dequantize

    kept = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(weight.shape)
    rows = torch.arange(len(weight))
    orders = [rows]
    orders += [rows.view(n, 2, -1).transpose(1, 2).flatten() for n in dict.fromkeys(heads) if len(rows) % (2 * n) == 0]
    # float16 keeps 11 bits of a value and no tiny ones (2^-24 is its smallest).
    return next((o for o in orders if torch.allclose(weight[o], kept, rtol=2**-10, atol=2**-23)), None)
