"""Rows end to end train as padded ones do, and a way of doing it that does not is found before it trains."""

import itertools
import json
import shutil
import statistics

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sft.data import collators
from sft.errors import Refusal
from sft.lifecycle import run
from sft.model import compilation, cuda_graphs, padding_free
from sft.model import loss as model_loss
from sft.plan.plan import PADDING_FREE_KINDS
from sft.training import acceleration
from sft.training.acceleration import choose_lengths
from tests.conftest import SMALL, make_settings
from tests.integration.test_nonfinite import quick_report  # noqa: F401

JOB = (*SMALL, "trainer=debug", "dataset.max_rows=60", "trainer.learning_rate=1e-3", "trainer.per_device_train_batch_size=4",
       "trainer.gradient_accumulation_steps=2", "samples.num_held_out=0", "trainer.save_steps=20",
       "trainer.eval_steps=20")  # fmt: skip


def write_rows(place):
    """The overrides that name sixty short rows of many lengths."""
    text = "a few words of an answer that is now and then a little longer than the one before it and may end"
    words = text.split(" ")
    rows = [{"instruction": f"{i} {' '.join(words[: i % 13])}", "output": " ".join(words[: 1 + 7 * i % 20])} for i in range(60)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "dataset=local", f"dataset.path={place / 'rows.jsonl'}"


def train(folder, *overrides):
    """(numbers of each step, run.json) of one run."""
    result = run(make_settings(*JOB, *write_rows(folder.parent), *overrides), folder)
    assert result.status == "finished", (folder / "train.log").read_text(encoding="utf-8")[-2000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "eval_loss", "tokens")}
    return numbers, json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("learnt", ["answer", "all"])
def test_rows_end_to_end_train_as_padded_rows_do(tmp_path, learnt):
    """Forty steps: every loss within 1e-5, and no drift in one direction."""
    options = ("trainer.max_steps=40", f"dataset.loss_on={learnt}", "lora.lora_dropout=0")
    padded, record = train(tmp_path / "padded", *options, "trainer.padding_free=false")
    ours, ours_record = train(tmp_path / "flat", *options)
    assert (record["speed"]["padding_free"], ours_record["speed"]["padding_free"]) == (False, True)
    assert len(ours["loss"]) == 40 and ours["tokens"] == padded["tokens"]
    for key, most in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
        assert ours[key] == pytest.approx(padded[key], abs=most), key
    signed = [a - b for a, b in zip(ours["loss"], padded["loss"], strict=True)]
    assert abs(statistics.fmean(signed)) < 2e-6


def test_layers_that_are_computed_again_attend_inside_each_row_again(tmp_path):
    """With gradient checkpointing the losses and gradients are those without, to the last bit: the same is computed twice."""
    options = ("trainer.max_steps=6", "lora.lora_dropout=0")
    usual, _ = train(tmp_path / "kept", *options)
    for every in (1, 2):
        again = ("trainer.gradient_checkpointing=true", "trainer.extra.gradient_checkpointing_kwargs.use_reentrant=false",
                 f"trainer.extra.gradient_checkpointing_kwargs.every_n_layers={every}")  # fmt: skip
        ours, record = train(tmp_path / f"again_{every}", *options, *again)
        assert record["speed"]["padding_free"] is True
        assert {key: ours[key] for key in ("loss", "grad_norm")} == {key: usual[key] for key in ("loss", "grad_norm")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of torch to itself
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile writes C++ on the CPU, and no g++ is installed")
def test_compiled_layers_train_as_they_do_uncompiled(tmp_path, monkeypatch):
    """Ten steps in float32: every loss within 1e-5. Another rank is not compiled again. On the command line this is refused
    without a GPU.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # not in processes that import torch for it
    # g++ takes half of the time to find out which vectors this CPU has, and to write faster loops for tiny tensors.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    monkeypatch.setattr("torch._inductor.cpp_builder._get_optimization_cflags", lambda *_, **__: (["O0", "DNDEBUG"], []))
    graphs = []
    for rank in (8, 4):
        options = ("trainer.max_steps=10", "lora.lora_dropout=0", "lora.lora_alpha=16", f"lora.r={rank}")
        usual, record = train(tmp_path / f"usual{rank}", *options)
        ours, ours_record = train(tmp_path / f"compiled{rank}", *options, "trainer.torch_compile=true")
        graphs.append(counters["stats"]["unique_graphs"])
        assert (record["speed"]["compiled"], ours_record["speed"]["compiled"]) == (False, True)
        for key, most in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
            assert ours[key] == pytest.approx(usual[key], abs=most), key
        assert abs(statistics.fmean(a - b for a, b in zip(ours["loss"], usual["loss"], strict=True))) < 2e-6
    assert graphs[0] == graphs[1] > 0
    assert compilation._as_tensor(2.0, torch.device("cpu")) is compilation._as_tensor(2.0, torch.device("cpu")), (
        "else a replay reads what was"
    )


def test_tokens_that_see_the_row_before_are_found_and_rows_are_padded(tmp_path, monkeypatch, caplog):
    """A planted error, too small for the loss to show it: attention that knows nothing of the rows' ends."""
    monkeypatch.setitem(acceleration.TOLERANCE, 4, 0.1)
    attend = padding_free.attend

    def leaking(module, query, key, value, mask, **kwargs):
        ends = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return attend(module, query, key, value, mask, **{**kwargs, "cu_seq_lens_q": ends})

    monkeypatch.setattr(padding_free, "attend", leaking)
    with caplog.at_level("INFO"):
        _, record = train(tmp_path / "run", "trainer.max_steps=2")
    assert record["speed"]["padding_free"] is False and "a row would not be what it is alone" in record["speed"]["why_not"]
    assert any("rows are padded" in line for line in caplog.messages)
    with pytest.raises(Refusal, match="padding_free=null"):
        run(make_settings(*JOB, *write_rows(tmp_path), "trainer.max_steps=2", "trainer.padding_free=true"), tmp_path / "asked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PADDING_FREE_KINDS)
def test_each_kind_of_model_that_auto_takes_agrees_with_rows_alone(kind, dtype):
    """Random weights in the shape of each kind, its own attention and norms: what `model.backend=auto` counts on. In bfloat16
    as where all weights are trained: they are float32, and autocast computes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    padding_free.install(model)
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in (4, 9, 17)]
    assert acceleration._difference(model, rows, 0, dtype) == ""


def test_a_loss_divided_by_another_number_is_found(tmp_path, monkeypatch):
    usual = model_loss.linear_cross_entropy
    monkeypatch.setattr(padding_free, "linear_cross_entropy", lambda *args: usual(*args) * 1.01)
    _, record = train(tmp_path / "run", "trainer.max_steps=2")
    assert "the loss of the first rows" in record["speed"]["why_not"]


@pytest.mark.parametrize(
    "overrides, why",
    [
        (["trainer.padding_free=false"], "trainer.padding_free=false"),
        (["trainer.extra.neftune_noise_alpha=5"], "neftune_noise_alpha"),
        (["model.attn_implementation=eager"], "attn_implementation=eager"),
    ],
)
def test_what_has_a_batch_of_its_own_keeps_it(tmp_path, overrides, why):
    _, record = train(tmp_path / "run", "trainer.max_steps=1", *overrides)
    assert record["speed"]["padding_free"] is False and why in record["speed"]["why_not"]


@pytest.mark.parametrize("piece", [1, 2**27])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(monkeypatch, piece):
    monkeypatch.setattr(model_loss, "PIECE", piece)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.randint(0, 11, (7,))
    found = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = (
            model_loss.linear_cross_entropy(h, w, targets)
            if ours
            else torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="sum")
        )
        (loss / 3).backward()
        found.append((loss.detach(), h.grad, w.grad))
    for ours, whole in zip(*found, strict=True):
        assert torch.allclose(ours, whole, atol=1e-5)


class Peak(TorchDispatchMode):
    """Counts the bytes of all that is made inside and still there."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return found


@pytest.mark.parametrize("learning", [True, False])
def test_nothing_of_a_piece_waits_beside_the_next_one(monkeypatch, learning):
    """Six bytes a logit in 16 bits: its own two and the four of its logarithm; four more on the CPU, which copies it first."""
    monkeypatch.setattr(model_loss, "PIECE", 64 * 1000)
    hidden, weight = torch.randn(300, 4, dtype=torch.bfloat16), torch.randn(1000, 4, dtype=torch.bfloat16)
    hidden.requires_grad_(learning)
    with Peak() as seen:
        model_loss.linear_cross_entropy(hidden, weight, torch.randint(0, 1000, (300,)))
    assert 10 * 64 * 1000 <= seen.peak < 10.3 * 64 * 1000


def test_a_window_hides_what_lies_before_it():
    """Sliding attention of width 2: a token sees itself and the one before."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4) for _ in range(3))
    ends = torch.tensor([0, 4, 5, 5], dtype=torch.int32)
    found, _ = padding_free.attend(None, q, k, v, None, sliding_window=2, cu_seq_lens_q=ends, max_length_q=4)
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_lengths_fill_up_little_and_are_few():
    lengths = [20 + 7 * i % 400 for i in range(500)]
    chosen = choose_lengths(lengths, 8, 1)
    assert (
        len(chosen) <= acceleration.NUM_LENGTHS and all(n % 64 == 0 for n in chosen) and chosen == choose_lengths(lengths, 8, 1)
    )
    assert choose_lengths([64], 8, 1) == (512,)
    assert choose_lengths(lengths, 8, 1, most=1000) == () and all(n <= 1900 for n in choose_lengths(lengths, 8, 1, most=1900))
    longest = sum(sorted(lengths)[-8:])
    for most in (None, 10_000):  # where the memory is short the largest pass there can be has its length too
        whole = choose_lengths(lengths, 8, 1, count=6, most=most, whole=True)
        assert 0 <= whole[-1] - longest < 64 and len(whole) <= 6
    assert choose_lengths(lengths, 8, 1, most=1000, whole=True) == ()
    one, many = choose_lengths(lengths, 8, 1, count=1), choose_lengths(lengths, 8, 1, count=40)
    assert len(one) == 1 and one[-1] == many[-1] == chosen[-1]


def test_an_opened_4bit_layer_multiplies_as_the_library_does():
    bnb = pytest.importorskip("bitsandbytes")
    from sft.model.nf4 import open_layers

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(64, 128)})
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize("cpu")
    x = torch.randn(3, 128, requires_grad=True)
    usual = layer(x)
    (grad,) = torch.autograd.grad(usual.sum(), x)
    holder = torch.nn.Sequential(layer)
    assert open_layers(holder) == 1
    ours = holder(x)
    (our_grad,) = torch.autograd.grad(ours.sum(), x)
    assert torch.allclose(ours, usual, atol=1e-5) and torch.allclose(our_grad, grad, atol=1e-5)


def test_a_pass_made_up_for_a_recording_has_rows_that_attention_takes():
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in (40, 90, 17)]
    inputs = collators.PaddingFreeCollator(0, 90, lengths=(192,), rows=3)(rows)
    for length in (64, 192, 320):
        made = cuda_graphs.of_length(inputs, length, 5)
        ends = made["cu_seq_lens_q"].tolist()
        assert (
            made["input_ids"].shape == made["position_ids"].shape == (1, length) and made["cu_seq_lens_q"].dtype == torch.int32
        )
        assert len(ends) == len(inputs["cu_seq_lens_q"]) == 5 and (ends[0], ends[-1]) == (0, length)
        counts = [b - a for a, b in itertools.pairwise(ends)]
        assert all(0 <= n <= 90 for n in counts)
        assert made["position_ids"][0].tolist() == [place for n in counts for place in range(n)]


def test_the_check_of_the_first_rows_looks_at_the_ends_of_long_ones():
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (900, 300, 20, 700)]
    found = acceleration._first_rows(rows)
    assert [len(row["input_ids"]) for row in found] == [20, 256, 256] and found[1]["labels"][-1] == 299
