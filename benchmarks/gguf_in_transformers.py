"""Where a GGUF file's answers part from transformers': at the file's weights, or at llama.cpp's arithmetic?

    python benchmarks/gguf_in_transformers.py outputs/<run> 16               # 16 prompts; `scripts/export.py` made the files
    python benchmarks/gguf_in_transformers.py outputs/<run> 0 q4_k_m q5_k_m   # these files, the loss alone

The same file is read in three ways: transformers unpacks its weights to float32; llama.cpp computes with them as they are, and
rounds what it multiplies them with to 8 bits (q8_0 and the k-types) or 16 (f16); and llama.cpp reads a copy whose weights are
unpacked to float32, so that nothing is rounded. What the first and the last agree on is no fault of the file; what the last
two differ in is the price of llama.cpp's fast arithmetic. Against the trained model each is held by export/verify.json.
"""

import collections
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export import gguf, proof, verify
from sft.records import read_json

NEW_TOKENS = 48


def compare(file: Path, rows: list[proof.Row], prompts: int, stop_ids: list[int], pad: int) -> str:
    """One line of the table."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = proof.measure_torch(model, rows, prompts, NEW_TOKENS, stop_ids, pad)
    del model
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, "model-f32.gguf")
        unpack(file, unpacked)
        cells = [f"{file.name}", f"{ours.loss:.5f}"]
        for read in (unpacked, file):
            theirs = gguf.measure(read, rows, prompts, NEW_TOKENS, stop_ids, [])["measurement"]
            gaps = [parting["gap"] for parting in verify.find_partings(ours, theirs)]
            told = ", ".join("far" if gap is None else f"{gap:.4f}" for gap in gaps) or "-"
            cells += [f"{theirs.loss - ours.loss:+.6f}", f"{prompts - len(gaps)} of {prompts}", told]
    return f"| {' | '.join(cells)} |"


def unpack(file: Path, target: Path) -> None:
    """A copy of a GGUF file with every weight in float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

    reader = GGUFReader(file)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kinds = field.types
        writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_types(file: Path) -> str:
    """How many of a file's weights are in which type, and where each of them is used."""
    from gguf import GGUFReader

    weights: collections.Counter = collections.Counter()
    places = collections.defaultdict(set)
    for tensor in GGUFReader(file).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
        places[tensor.tensor_type.name].add(tensor.name.split(".")[-2])
    total = sum(weights.values())
    return ", ".join(f"{k} {n / total:.1%} ({', '.join(sorted(places[k]))})" for k, n in weights.most_common())


def main() -> None:
    """Print the table, with the gaps where answers part in nats, and the types of each file's weights."""
    run, prompts = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    kinds = sys.argv[3:] or ["*"]
    files = sorted(file for kind in kinds for file in (run / "export" / "gguf").glob(f"model-{kind}.gguf"))
    for file in files:
        print(f"{file.name}: {weight_types(file)}")
    rows = proof.read_rows(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    stop_ids = tokenizer.convert_tokens_to_ids(read_json(run / "preflight.json")["stop_tokens"])
    print("| file | loss in transformers | llama.cpp, unpacked | answers | gaps | llama.cpp, as it is | answers | gaps |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for file in files:
        print(compare(file, rows, prompts, stop_ids, tokenizer.pad_token_id), flush=True)


if __name__ == "__main__":
    main()
