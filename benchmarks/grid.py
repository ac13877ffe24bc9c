"""How training speed grows with the rows of a step, the length of rows and the rank of the adapter, as a table and a drawing.

    python benchmarks/grid.py --model DIR --out DIR --modes bf16,fp8 --rounds 3            on a GPU
    python benchmarks/grid.py --model DIR --out DIR --axes rows --peers unsloth,trl        one axis, peers at each point
    python benchmarks/grid.py --model tiny_random --out DIR --axes rank --points 4,8 --modes default --steps 3 --warm-up 1

Each axis and mode is one sweep of train.py, whose jobs share the base: `rows` a step (of some 190 tokens, as make_rows.py has
them), `length` of the rows, all alike, and `rank`; what is not varied is 8 rows, these rows, rank 16. How many rows are
computed at once is left to `auto`. A peer is a process of its own for each point, with its rows at once and without
checkpointing. Tokens a second are non-padding tokens of whole steps after the warm-up of STEPS, as speed.py counts them. In
each round the order is turned; the table has medians, and says what failed. Writes grid.json, grid.md and, where vl-convert is
installed, grid.svg after each point. What grid.json has already from the same day, hardware and versions stays.
scripts/benchmarks_page.py takes it from results/grids/, under the name of the GPU.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speed
from sft.model import builtin

AXES = {
    "rows": [1, 2, 4, 8, 16, 32, 64, 128],
    "length": [256, 512, 1024, 2048, 4096, 8192],
    "rank": [4, 8, 16, 32, 64, 128, 256],
}
STEPS = {"rows": (45, 25), "length": (14, 6), "rank": (45, 25)}
"""Steps of a point, and how many of them are not counted: rows of all lengths take longer until no new step is captured."""

UNITS = {"rows": "rows a step", "length": "tokens of a row", "rank": "rank of the adapter"}
MODES = {
    "bf16": ("model.backend=transformers", "model.load_in_4bit=false"),
    "nf4": ("model.backend=transformers", "model.load_in_4bit=true"),
    "fp8": ("model.backend=transformers", "model.load_in_4bit=false", "model.load_in_fp8=true"),
    "default": (),
}
COMPILED = ("trainer.torch_compile=true",)
PEERS = {"unsloth": (), "trl": ("--optim=adamw_torch_fused",)}
ROWS, RANK, TEMPLATE = 8, 16, 64
"""What is not varied, and tokens that a length leaves to the template."""


def main(argv: list[str] | None = None) -> None:
    """Measure each axis and mode in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--points", help="of the one axis, separated by commas, other than all")
    parser.add_argument("--modes", default="bf16", help=", ".join(MODES))
    parser.add_argument("--peers", default="", help="unsloth, trl or both, separated by commas; in bf16")
    parser.add_argument("--steps", type=int, help="other than those of STEPS")
    parser.add_argument("--warm-up", type=int, help="other than those of STEPS")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overrides", default="", help="for ours, separated by spaces")
    args = parser.parse_args(argv)
    args.model = str(builtin.local_model(args.model) or args.model)  # a peer knows no name of ours
    axes, modes, peers = (list(filter(None, text.split(","))) for text in (args.axes, args.modes, args.peers))
    for named, known in ((axes, AXES), (modes, MODES), (peers, PEERS)):
        if unknown := [name for name in named if name not in known]:
            parser.error(f"{', '.join(unknown)}: there are {', '.join(known)}")
    if args.points and len(axes) > 1:
        parser.error("--points are those of one axis: name it with --axes")
    points = {axis: [int(point) for point in args.points.split(",")] if args.points else AXES[axis] for axis in axes}
    wanted = args.steps, args.warm_up
    steps = {axis: [n if n is not None else usual for n, usual in zip(wanted, STEPS[axis], strict=True)] for axis in axes}
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"date": f"{datetime.date.today()}", "hardware": speed.hardware(), "versions": speed.versions()}
    kept = json.loads(speed.read(args.out / "grid.json") or "{}")
    if kept and not facts.items() <= kept.items():
        parser.error(f"{args.out}/grid.json is of another day, hardware or versions: --out=<another folder>")
    if other := [axis for axis in axes if kept.get("steps", {}).get(axis, steps[axis]) != steps[axis]]:
        parser.error(f"{args.out}/grid.json has other steps of {', '.join(other)}: --out=<another folder>")
    results, steps = kept.get("results", {}), kept.get("steps", {}) | steps
    command = " ".join(["grid.py", *(sys.argv[1:] if argv is None else argv)])
    facts |= {"commands": [*kept.get("commands", []), command], "steps": steps}
    for turn in range(args.rounds):
        for axis, way in list(itertools.product(axes, [*modes, *peers]))[:: 1 if turn % 2 == 0 else -1]:
            order = points[axis][:: 1 if turn % 2 == 0 else -1]
            args.steps, warm_up = steps[axis]
            measure = sweep if way in MODES else peer
            for point, found in measure(args, axis, order, way):
                results.setdefault(axis, {}).setdefault(way, {}).setdefault(str(point), []).append(shortened(found))
                print(f"{axis:<7} {point:>5} {way:<8} {speed.line_of(found, warm_up)}", flush=True)
                write(args.out, {**facts, "results": results})


def sweep(args: argparse.Namespace, axis: str, points: list[int], mode: str):
    """Yield (a point, what was measured) of one sweep over an axis; all of them failed where its log says why."""
    place = unused(args.out / f"{axis}_{mode}")
    files = [rows_file(args, axis, point) for point in points]
    varied = {
        "rows": ("trainer.effective_batch_size", points), "length": ("dataset.path", files), "rank": ("lora.r", points),
    }[axis]  # fmt: skip
    settings: dict[str, Any] = {"dataset.path": files[0], "lora.r": RANK, "trainer.effective_batch_size": ROWS}
    settings |= {varied[0]: ",".join(map(str, varied[1])), "trainer.per_device_train_batch_size": "auto"}
    settings |= {"model.name": args.model, "model.max_seq_length": max([2048, *points]) if axis == "length" else 2048}
    settings |= {"dataset.template": "alpaca", "dataset.loss_on": "all", "dataset.eval_fraction": 0}
    settings |= {"trainer.max_steps": args.steps, "trainer.save_steps": args.steps, "seed": 3407, "samples.num_held_out": 0}
    command = [sys.executable, str(ROOT / "train.py"), "-m", "dataset=local", "tracking=none", f"hydra.sweep.dir={place}"]
    command += [*(f"{key}={value}" for key, value in settings.items()), *MODES[mode], *(COMPILED if mode != "default" else ())]
    with open(f"{place}.log", "w", encoding="utf-8") as log:
        subprocess.run([*command, *args.overrides.split()], stdout=log, stderr=subprocess.STDOUT)
    folders = {int(folder.name.partition("_")[0]): folder for folder in place.glob("*_*") if (folder / "run.json").is_file()}
    for number, point in enumerate(points):
        yield point, job(folders[number]) if number in folders else {"error": speed.read(Path(f"{place}.log"))[-1500:]}


def job(folder: Path) -> dict[str, Any]:
    """What speed.py says of a run, of a job of a sweep."""
    record = json.loads(speed.read(folder / "run.json"))
    if record["status"] != "finished":
        return {"error": record.get("reason") or record["status"]}
    found, whole = speed.steps_of(folder), record["seconds"]["total"]
    return {
        **found,
        "first_step": whole - sum(found["seconds"]),
        "saved": whole,
        "split": record["split"],
        "parts": record["seconds"],
    }


def shortened(found: dict[str, Any]) -> dict[str, Any]:
    """A measurement without its losses, which say nothing with random words; seconds to a tenth of a millisecond."""
    kept = {key: value for key, value in found.items() if key != "losses"}
    return kept | {"seconds": [round(seconds, 4) for seconds in found["seconds"]]} if "seconds" in found else kept


def peer(args: argparse.Namespace, axis: str, points: list[int], library: str):
    """Yield (a point, what was measured) of a peer, each a process."""
    for point in points:
        rows, rank = point if axis == "rows" else ROWS, point if axis == "rank" else RANK
        options = (f"--rank={rank}", f"--max-length={max(2048, point) if axis == 'length' else 2048}", *PEERS[library])
        args.data = rows_file(args, axis, point)
        place = unused(args.out / f"{axis}_{library}_{point}")
        yield point, speed.measure_peer(args, (library, rows, 1, options), args.steps, place)


def unused(place: Path) -> Path:
    """`place` with the first number that no measurement took: the same folder again would go on with that sweep."""
    numbered = (Path(f"{place}_{number}") for number in itertools.count())
    return next(path for path in numbered if not Path(f"{path}.log").exists())


def rows_file(args: argparse.Namespace, axis: str, point: int) -> str:
    """The file with the rows of a point, written once: as many for every point, since `auto` plans for the longest row of a
    file, and with fewer of them would choose other micro-batches."""
    count = args.steps * (ROWS if axis == "length" else max(AXES["rows"]))
    file = args.out.absolute() / (f"rows_of_{point}.json" if axis == "length" else "rows.json")
    words = ["--words", str(point - TEMPLATE)] if axis == "length" else []
    if not file.is_file() or len(json.loads(file.read_text(encoding="utf-8"))) < count:
        command = [sys.executable, str(ROOT / "benchmarks/make_rows.py"), str(file), "--rows", str(count), *words]
        subprocess.run(command, check=True)
    return str(file)


def write(out: Path, measured: dict[str, Any]) -> None:
    """The measurements, their tables and their drawing."""
    (out / "grid.json").write_text(json.dumps(measured), encoding="utf-8")
    commands = ", ".join(f"`{command}`" for command in measured["commands"])
    head = f"{commands}, {measured['date']}, {measured['hardware']}; {measured['versions']}"
    (out / "grid.md").write_text(f"{head}\n\n{tables(measured)}", encoding="utf-8")
    if importlib.util.find_spec("vl_convert"):
        (out / "grid.svg").write_text(svg(measured), encoding="utf-8")


def medians(points: dict[str, list[dict]], warm_up: int) -> dict[int, tuple[float, float]]:
    """(tokens a second, peak GiB) by point, medians of the rounds that did not fail."""
    return {
        point: (statistics.median(rates), statistics.median(gib))
        for point, (rates, gib) in measurements(points, warm_up).items()
    }


def measurements(points: dict[str, list[dict]], warm_up: int) -> dict[int, tuple[list[float], list[float]]]:
    """(tokens a second, peak GiB) of all rounds by point, without those that failed."""
    good = {int(point): [run for run in runs if "error" not in run] for point, runs in points.items()}
    return {
        point: ([speed.rate(run, warm_up) for run in runs], [run["peak_reserved_gib"] for run in runs])
        for point, runs in good.items()
        if runs
    }


def tables(measured: dict[str, Any]) -> str:
    """A Markdown table for each axis: tokens a second and peak GiB by way, and each of ours as a ratio to each peer.

    Medians, and a range where rates are more than a tenth apart. The ratios are to the best that a peer reached: its steps
    wait for the processor, so that hosts make more of a difference to it than rounds do.
    """
    out = []
    for axis, ways in measured["results"].items():
        rounds = {way: measurements(points, measured["steps"][axis][1]) for way, points in ways.items()}
        found = {way: medians(points, measured["steps"][axis][1]) for way, points in ways.items()}
        ratios = [(ours, other) for ours in ways if ours in MODES for other in ways if other in PEERS]
        heads = [UNITS[axis], *(f"{way}{unit}" for way in ways for unit in (" tokens/s", " GiB"))]
        heads += [f"{ours} x {other}'s best" for ours, other in ratios]
        out += [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
        for point in sorted({int(point) for points in ways.values() for point in points}):
            cells = [f"{point:,}"]
            for way, values in found.items():
                if point in values:
                    cells += [f"{values[point][0]:,.0f}{apart(rounds[way][point][0])}", f"{values[point][1]:.1f}"]
                else:
                    cells += [missing(ways[way], point), ""]
            for ours, other in ratios:
                both = point in found[ours] and point in found[other]
                cells.append(f"{found[ours][point][0] / max(rounds[other][point][0]):.2f}" if both else "")
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def apart(rates: list[float]) -> str:
    """The range of measurements where they are more than a tenth apart."""
    return f" ({min(rates):,.0f} to {max(rates):,.0f})" if max(rates) > 1.1 * min(rates) else ""


def missing(points: dict[str, list[dict]], point: int) -> str:
    """What stands in the place of a rate that there is none of: nothing where it was not measured."""
    errors = [run["error"] for run in points.get(str(point), [])]
    return "" if not errors else "no memory" if all("OutOfMemoryError" in error for error in errors) else "failed"


def svg(measured: dict[str, Any]) -> str:
    """A chart for each axis, side by side: tokens a second, on logarithmic axes, all of one range."""
    import vl_convert

    found = {
        axis: {way: medians(points, measured["steps"][axis][1]) for way, points in ways.items()}
        for axis, ways in measured["results"].items()
    }
    rates = [rate for ways in found.values() for points in ways.values() for rate, _ in points.values()]
    scale = {"type": "log", "nice": False, "domain": [min(rates, default=1) / 1.2, max(rates, default=1) * 1.2]}
    y = {"field": "rate", "type": "quantitative", "scale": scale, "title": "tokens/s", "axis": {"format": ",d", "tickCount": 5}}
    charts = []
    for axis, ways in found.items():
        values = [{"way": way, "point": point, "rate": pair[0]} for way in ways for point, pair in ways[way].items()]
        x = {"field": "point", "type": "quantitative", "scale": {"type": "log", "base": 2}, "title": UNITS[axis],
             "axis": {"values": sorted({value["point"] for value in values}), "format": ",d"}}  # fmt: skip
        encoding = {"x": x, "y": y, "color": {"field": "way", "type": "nominal", "title": None}}
        charts.append({"width": 260, "height": 220, "data": {"values": values}, "encoding": encoding,
                       "mark": {"type": "line", "point": True}})  # fmt: skip
    schema = "https://vega.github.io/schema/vega-lite/v5.json"
    return vl_convert.vegalite_to_svg({"$schema": schema, "hconcat": charts, "background": "white"})


if __name__ == "__main__":
    main()
