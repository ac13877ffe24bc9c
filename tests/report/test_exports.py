"""Each export in a sentence."""

from sft.report.exports import describe_exports
from sft.report.texts import speaker


def artifact(size: float, kept: float | None = None, **other) -> dict:
    return {"status": "ok", "size_bytes": size * 1e6, **({} if kept is None else {"gain_kept": kept}), **other}


def describe(**artifacts: dict) -> dict[str, tuple[str, str]]:
    return {one["key"]: (one["tone"], one["sentence"]) for one in describe_exports({"artifacts": artifacts}, speaker("en"))}


def test_the_smallest_that_keeps_all_of_the_gain_is_recommended():
    found = describe(adapter=artifact(23, 1.0), f16=artifact(270, 1.0), q8_0=artifact(145, 0.985), q4_k_m=artifact(105, 0.72))
    assert found == {
        "adapter": ("good", "adapter, loaded beside the base model, keeps all of the gain, at 23 MB."),
        "f16": ("good", "f16 keeps all of the gain, at 270 MB."),
        "q8_0": ("good", "Use q8_0: it keeps all of the gain, at 145 MB."),
        "q4_k_m": ("good", "q4_k_m keeps 72% of the gain, at 105 MB."),
    }


def test_one_that_failed_lost_much_or_was_not_made_is_named():
    found = describe(q5=artifact(1.2, 0.41, status="failed", failed=["loss"]), q3=artifact(90, 0.2), q2=artifact(50, -0.5),
                     bf16={"status": "error", "error": "disk full"})  # fmt: skip
    assert found["q5"] == ("bad", "Do not use q5: it keeps 41% of the gain (failed: loss).")
    assert found["q3"] == ("warn", "q3 keeps 20% of the gain, at 90 MB.")
    assert found["q2"] == ("warn", "q2 keeps nothing of the gain, at 50 MB.")
    assert found["bf16"] == ("bad", "bf16 could not be made: disk full")


def test_where_the_gain_is_not_known_nothing_is_recommended():
    assert describe(q8_0=artifact(145, loss_increase=0.0038)) == {
        "q8_0": ("good", "q8_0 changes the loss by +0.0038, at 145 MB.")
    }
    assert describe(q8_0=artifact(145)) == {"q8_0": ("good", "q8_0 holds, at 145 MB.")} and describe() == {}
