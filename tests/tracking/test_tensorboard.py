"""TensorBoard's files, read back with its own reader."""

import pytest

from sft.config.schema import Settings, TrackerName, TrackingSettings
from sft.storage.jsonio import append_jsonl
from sft.tracking.base import make_trackers
from tests.conftest import make_settings

pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install -e '.[tensorboard]'")


def tracked(**changes) -> Settings:
    return Settings(tracking=TrackingSettings(tracker=TrackerName.tensorboard, **changes))


def read_back(folder):
    """What TensorBoard shows of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return shown


def curve(shown, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in shown.Scalars(key)]


def texts(shown, title: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in shown.Tensors(f"{title}/text_summary")]


def log_line(folder, tracker, line: dict) -> None:
    append_jsonl(folder / "metrics.jsonl", line)
    tracker.log(line)


def answer(step: int, text: str) -> dict:
    return {"index": 0, "step": step, "prompt": "p", "completion": text, "finish": "eos", "reference": "r"}


def test_lines_samples_settings_and_the_ending_are_there_by_the_names_that_wandb_has(tmp_path):
    settings = make_settings("tracking=tensorboard", "lora.r=4", "tracking.tags=[mine]")
    tracker = make_trackers(settings)
    tracker.begin(settings, tmp_path, {"name": "n", "command": "python train.py"}, "transformers")
    log_line(tmp_path, tracker, {"step": 1, "loss": 2.5, "tokens": 40})
    log_line(tmp_path, tracker, {"step": 1, "eval_loss": 2.25})
    tracker.describe({"parameters": 7})
    tracker.log_samples([answer(0, "base")], [])
    tracker.log_samples([answer(1, "later")], [answer(0, "base")])
    tracker.finish("finished", {"eval_loss": 2.25}, "stopped early")
    shown = read_back(tmp_path)
    assert curve(shown, "train/loss") == [(1, 2.5)] and curve(shown, "eval/loss") == [(1, 2.25)]
    assert curve(shown, "train/global_step") == [(1, 1), (1, 1)] and curve(shown, "train/num_tokens") == [(1, 40), (1, 40)]
    assert "**base answer**\n\n    base\n\n**answer**\n\n    later" in texts(shown, "samples/0")[-1]
    assert '"parameters": 7' in texts(shown, "config")[-1] and '"mine"' in texts(shown, "config")[-1]
    assert '"stopped early"' in texts(shown, "ending")[0]
    table = [meta.plugin_data.content for tag, meta in shown.summary_metadata.items() if tag.endswith("session_start_info")]
    assert len(table) == 1 and b"lora.r" in table[0]
    assert tracker.state() == {"mode": "offline", "url": None, "sync": None, "tracker": "tensorboard"}


@pytest.mark.parametrize("status, ended", [("finished", True), ("failed", False)])
def test_a_run_that_failed_is_no_success_in_the_table_of_hyperparameters(status, ended, tmp_path):
    tracker = make_trackers(tracked())
    tracker.begin(tracked(), tmp_path, {"name": "n"}, "transformers")
    tracker.finish(status, {}, "out of memory" if status == "failed" else None)
    assert any(tag.endswith("session_end_info") for tag in read_back(tmp_path).summary_metadata) is ended


def test_a_cut_run_that_goes_on_shows_each_step_once(tmp_path):
    first = make_trackers(tracked())
    first.begin(tracked(), tmp_path, {"name": "n"}, "transformers")
    for step in (1, 2, 3, 4):
        log_line(tmp_path, first, {"step": step, "loss": 10.0 - step, "tokens": 10 * step})
    kept = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    first.trackers[0].writer.close()  # killed, after the checkpoint of step 2
    again = make_trackers(tracked())
    again.begin(tracked(), tmp_path, {"name": "n", "tracking": first.state()}, "transformers")
    (tmp_path / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    for step in (3, 4, 5):
        log_line(tmp_path, again, {"step": step, "loss": 20.0 - step})
    again.finish("finished", {})
    shown = read_back(tmp_path)
    assert curve(shown, "train/loss") == [(1, 9), (2, 8), (3, 17), (4, 16), (5, 15)]
    assert curve(shown, "train/num_tokens")[2:] == [(3, 20), (4, 20), (5, 20)]
