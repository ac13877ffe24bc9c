"""Read the command line before Hydra does, and refuse it with every problem in one message.

Hydra stops at the first mistake, exits with 1 and tells people to type `+` before a misspelt key, which walks past the
schema. Here each override is checked against the schema first, then each job is composed and its settings checked.
"""

import os
import pickle
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sft.cli.overrides import check_override, is_known, looks_secret, needs_sweep, one_line, parse_overrides, secret, takes_one
from sft.config import schema
from sft.config.compose import PROCESSES, register, to_settings
from sft.config.consent import WORD
from sft.config.data_rules import why_lost
from sft.config.destinations import KEYS, check_destinations, destinations
from sft.config.keys import in_shell
from sft.config.rules import check_settings
from sft.config.schema import Settings
from sft.distributed.group import is_first, launched
from sft.errors import Problem, Refusal, chain_of, first_line
from sft.runs.resume import check_folder, recorded_run, working_folder
from sft.storage.cache import cache_dir
from sft.sweep.checks import check_interval, check_means, is_search, runs_elsewhere
from sft.sweep.grid import check_pairs, list_values


def stop_on_refusal(config_dir: Path, argv: list[str] | None = None, hardware: bool = True) -> None:
    """Run `check_command_line`; on a refusal print it to stderr and exit with 2.

    `resume=<run folder>` in sys.argv becomes what Hydra needs to work in that folder; a number of processes and the word that
    allows a model's own code stay beside it. Of several processes that torchrun has started, one comes back from here: the
    others follow it.
    """
    if argv is None:
        _leave_to_first()
    try:
        check_command_line(config_dir, sys.argv[1:] if argv is None else argv, hardware)
        others = [word for word in sys.argv[1:] if word == WORD or word.startswith(PROCESSES)]
        words = [word for word in sys.argv[1:] if word not in others]
        if argv is None and len(words) == 1 and words[0].startswith("resume="):  # not beside --help
            folder = Path(words[0].partition("=")[2]).expanduser().resolve()
            place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
            sys.argv[1:] = [f"resume='{place}'", f"hydra.run.dir='{place}'", "hydra.output_subdir=null", *others]
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        raise SystemExit(2) from None


def _leave_to_first() -> None:
    """Under torchrun: go over to following the first process, which reads the command line and speaks for all.

    Returns in the first process, and in a run of one. Where the command only asks for something, the others have nothing to do.
    """
    if launched() and not is_first():
        args, _ = get_args_parser().parse_known_args()
        if args.help or args.hydra_help or args.info or args.shell_completion or args.cfg:
            raise SystemExit(0)
        from sft.launch.follower import follow

        code = follow()
        sys.stderr.flush()
        os._exit(code)  # without waiting for threads that wait for the others


def check_command_line(config_dir: Path, argv: list[str], hardware: bool = True) -> None:
    """Compose what `argv` asks for and raise one Refusal with every problem in it.

    `hardware=False` leaves out what depends on this machine (a GPU, installed backends), for commands that only read.
    Flags that ask Hydra for information are left to Hydra. Takes about 0.3 s; multirun checks each value once.
    """
    args = _parse_flags(argv)
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    if args.multirun and args.cfg:
        raise Refusal([Problem(f"-m --cfg {args.cfg}", "--cfg shows one job, and -m asks for many.", "leave one of them out")])
    if any(text.startswith("resume=") for text in args.overrides):
        return _check_resume(argv, hardware)
    register()
    problems: list[Problem] = []
    config_name = args.config_name or "config"
    with initialize_config_dir(str(config_dir.resolve()), job_name="train", version_base="1.3"):
        search_path, options = _search_path(args), _group_options(config_dir, args)
        overrides = parse_overrides(args.overrides, problems)
        for plain in [o for o in overrides if o.key_or_group in ("hydra.sweeper", "hydra.launcher") and not _is_table(o)]:
            fix = plain.key_or_group.replace(".", "/") + "=sft"
            problems.append(Problem(one_line(plain), f"{plain.key_or_group} holds several settings, not a single one.", fix))
            overrides.remove(plain)
        means = _sweep_means(config_name, search_path, overrides)
        preset = _preset_sweep(means)
        overrides = [o for o in parse_overrides(preset, problems) if o.key_or_group not in _keys(overrides)] + overrides
        hydras = [o for o in overrides if o.is_sweep_override() and o.key_or_group.startswith("hydra")]
        problems += [takes_one(o) for o in hydras]
        overrides = [o for o in overrides if o not in hydras]
        if not (args.multirun or preset):
            swept = [o for o in overrides if o.is_sweep_override() and is_known(o.key_or_group)]
            problems += [needs_sweep(o) for o in swept]
            overrides = [o for o in overrides if o not in swept]
        if not is_search(means):
            problems += [check_interval(o) for o in overrides if o.is_interval_sweep()]
            overrides = [o for o in overrides if not o.is_interval_sweep()]
        good = [o for o in overrides if check_override(o, options, problems)]
        trains = hardware and not args.cfg
        hardware = trains and not runs_elsewhere(means)
        folder = None if args.multirun or preset or args.cfg else _run_folder(good)
        for job in _jobs_to_check(good):
            problems += _check_job(config_name, search_path + job, hardware, folder)
        if trains:
            problems += check_means(means, good, bool(args.multirun or preset)) + _check_writable(folder or Path("outputs"))
        if (args.multirun or preset) and launched():
            why = "torchrun has started the processes of one run, and a sweep has many."
            fix = "python train.py -m distributed.num_processes=2 ...   starts them for each run of the sweep"
            problems.append(Problem("torchrun train.py -m", why, fix))
        if (args.multirun or preset) and any(o.key_or_group == "preflight.mode" and o.value() == "only" for o in good):
            why = "A sweep has many jobs, and the check alone is about one."
            problems.append(Problem("-m preflight.mode=only", why, "leave -m and the swept values out"))
        problems += _check_swept_values(config_name, search_path, good, hardware)
        problems += _check_pairs(config_name, search_path, good)
    if problems:
        raise Refusal(list(dict.fromkeys(problems)))


def read_settings(config_dir: Path, argv: list[str], hardware: bool = True) -> Settings:
    """The settings of the one job that `argv` describes, for commands other than train.py. Raises Refusal."""
    check_command_line(config_dir, argv, hardware)
    args = _parse_flags(argv)
    if args.multirun:
        raise Refusal([Problem("-m", "A sweep has many jobs, and this command is about one.", "leave -m out")])
    if folders := [text.partition("=")[2] for text in args.overrides if text.startswith("resume=")]:
        return recorded_run(Path(folders[0]).expanduser(), WORD in argv)[0]
    with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
        return to_settings(compose(args.config_name or "config", overrides=_search_path(args) + args.overrides))


def _parse_flags(argv: list[str]) -> Any:
    """Hydra's own reading of the command line. Raises Refusal for what it would end with its usage text."""
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        secrets = [secret(text) for text in argv if looks_secret(text.lstrip("-"))]
        what = shlex.join(argv).replace("\n", "\\n")
        fix = "python train.py --hydra-help   lists the flags; settings are written key=value"
        raise Refusal(secrets or [Problem(what, f"It cannot be read: {message}.", fix)])

    parser.error = fail  # else it prints its usage and exits
    args, unknown = parser.parse_known_args(argv)
    problems = []
    for text in unknown:
        bare = text.lstrip("-")
        if looks_secret(bare):
            problems.append(secret(text))
        elif text != bare:
            fix = in_shell(bare) if "=" in bare else f"{bare}=<value>"
            problems.append(Problem(text, "There is no such flag; settings are written without dashes.", fix))
        else:
            why = "Overrides on both sides of a flag are not read."
            problems.append(Problem(text or '""', why, "put the flags first: python train.py -m key=value key=value"))
    if args.config_path:
        why = "It would take the place of the project's own settings."
        problems.append(Problem(f"--config-path {args.config_path}", why, f"--config-dir {args.config_path}   adds to them"))
    if args.config_dir and (why_lost(args.config_dir) or not Path(args.config_dir).is_dir()):
        fix = f"looked for {os.path.abspath(args.config_dir)}"
        problems.append(Problem(f"--config-dir {args.config_dir}", "There is no such folder.", fix))
    if problems:
        raise Refusal(problems)
    return args


def _search_path(args: Any) -> list[str]:
    return [f'hydra.searchpath=["file://{Path(args.config_dir).resolve()}"]'] if args.config_dir else []


def _check_yaml(config_name: str, search_path: list[str]) -> list[Problem]:
    """A broken or missing YAML file, found without any override."""
    try:
        compose(config_name, overrides=search_path)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        fix = "mend the file, or take it back from git"
        if config_name != "config":
            fix = "--config-name is rarely needed: presets are chosen with experiment=..."
        return [Problem(f"conf/{config_name}.yaml", f"It cannot be composed. {_reason(error)}", fix)]
    return []


def _group_options(config_dir: Path, args: Any) -> dict[str, list[str]]:
    """The options of each group: those of conf/ and those that --config-dir adds."""
    folders = [config_dir, *([Path(args.config_dir)] if args.config_dir else [])]
    return {g: sorted({file.stem for folder in folders for file in (folder / g).glob("*.yaml")}) for g in schema.GROUPS}


def _is_table(override: Override) -> bool:
    return isinstance(override._value, dict)


def _keys(overrides: list[Override]) -> set[str]:
    return {o.key_or_group for o in overrides}


def _sweep_means(config_name: str, search_path: list[str], overrides: list[Override]) -> DictConfig | None:
    """What was chosen of `sweep`, `experiment` and Hydra's own settings, composed; None where nothing was, or it cannot be."""
    chosen = [o for o in overrides if o.key_or_group in ("sweep", "experiment") or o.key_or_group.startswith("hydra")]
    if not chosen:
        return None
    lines = [o.input_line for o in chosen if not o.is_sweep_override()]
    try:
        return compose(config_name, overrides=search_path + lines, return_hydra_config=True).hydra
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None  # the checks below say what is wrong


def _preset_sweep(means: DictConfig | None) -> list[str]:
    """What a `sweep=` or `experiment=` preset sweeps over by itself, as overrides; nothing where it runs one job."""
    if means is None or means.mode != RunMode.MULTIRUN:
        return []
    return [f"{key}={value}" for key, value in (means.sweeper.get("params") or {}).items()]


def _check_pairs(config_name: str, search_path: list[str], overrides: list[Override]) -> list[Problem]:
    """Problems of `sweep.paired`, whether a preset or the command line sets it."""
    chosen = [o.input_line for o in overrides if o.key_or_group.startswith("sweep") or o.key_or_group == "experiment"]
    counts = {o.key_or_group: len(list_values(o)) for o in overrides if o.is_sweep_override()}
    if not counts or not chosen:
        return []
    try:
        config = compose(config_name, overrides=search_path + [line for line in chosen if "," not in line or "[" in line])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return []
    return check_pairs(list(config.sweep.paired), counts) if config.sweep.paired else []


def _run_folder(overrides: list[Override]) -> Path | None:
    """The folder that `hydra.run.dir` names, where it is known before Hydra fills it in."""
    named = [o.value() for o in overrides if o.key_or_group == "hydra.run.dir"]
    return Path(os.path.expanduser(named[-1])) if named and isinstance(named[-1], str) and "${" not in named[-1] else None


def _check_writable(folder: Path) -> list[Problem]:
    """The problems of a run folder and of the cache folder if they cannot be written. Leaves no trace."""
    problems = []
    if why := _why_unwritable(folder):
        problems.append(Problem(f"hydra.run.dir={folder}", why, "hydra.run.dir=<a folder that can be written>"))
    try:
        cache = cache_dir()
    except RuntimeError:  # no home folder, as in some containers
        why, cache = "There is no home folder for it.", "~/.cache/sft"
    else:
        why = _why_unwritable(cache)
    if why:
        problems.append(
            Problem(f"the cache folder {cache}", why, "SFT_CACHE=<a folder that can be written> python train.py ...")
        )
    return problems


def _why_unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, by the nearest one that is there; an empty text where it can."""
    if lost := why_lost(str(folder)):
        return lost
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"Nothing can be written to {place}: {error.strerror}."


def _check_resume(argv: list[str], hardware: bool) -> None:
    """Refuse `resume=<run folder>` that does not stand alone, or whose run cannot go on.

    Beside it may stand the words of sft/config/consent.py and sft/config/destinations.py, and a number of processes.
    """
    text = next(a for a in argv if a.startswith("resume="))
    counts = [a for a in argv if a.startswith(PROCESSES)]
    sent = [a for a in argv if a.partition("=")[0] in KEYS]
    others = [a for a in argv if a not in (text, WORD, *counts, *sent)]
    if others:
        why = f"A run goes on with its own settings, so that {shlex.join(others)} would be ignored."
        raise Refusal([Problem(shlex.join(argv), why, f"{shlex.quote(text)}   alone")])
    folder = text.partition("=")[2]
    if folder in ("", "null"):
        raise Refusal([Problem(text, "It names no folder.", "resume=outputs/<run>")])
    if lost := why_lost(folder):
        raise Refusal([Problem(text.replace("\n", "\\n"), lost, "resume=outputs/<run>")])
    place = Path(folder).expanduser().resolve()
    settings, record = recorded_run(place, WORD in argv, counts[-1].removeprefix(PROCESSES) if counts else None)
    goes_to = [f"{key}={value}" for key, value in destinations(settings).items()]
    others = [word for word in sent if word not in goes_to]
    problems = check_destinations(settings, record, sent, shlex.quote(text))
    if others:
        named = " and ".join(goes_to) or "nobody"
        why = f"The run sends what it makes to {named}, so that {shlex.join(others)} would be ignored."
        problems.append(Problem(shlex.join(argv), why, f"{shlex.quote(text)}   alone"))
    with working_folder(record, place):
        problems += check_settings(settings, hardware) + _check_writable(place)
    if problems:
        raise Refusal(problems)


def _jobs_to_check(overrides: list[Override]) -> list[list[str]]:
    """One job with the first value of every sweep, and one more for each further option of a group or added key."""
    swept = {i: list_values(o) for i, o in enumerate(overrides) if o.is_sweep_override()}
    base = _first_job(overrides)
    jobs = [base]
    for i, values in swept.items():
        for value in values[1:] if overrides[i].key_or_group in schema.GROUPS or overrides[i].is_add() else ():
            jobs.append([*base[:i], f"{overrides[i].input_line.partition('=')[0]}={value}", *base[i + 1 :]])
    return jobs


def _first_job(overrides: list[Override]) -> list[str]:
    swept = {i: list_values(o) for i, o in enumerate(overrides) if o.is_sweep_override()}
    first = {i: f"{overrides[i].input_line.partition('=')[0]}={values[0]}" for i, values in swept.items() if values}
    return [first.get(i, o.input_line) for i, o in enumerate(overrides)]


def _check_swept_values(config_name: str, search_path: list[str], overrides: list[Override], hardware: bool) -> list[Problem]:
    """Problems of the further values of swept settings, set on the first job: composing one for each would take minutes."""
    swept = [o for o in overrides if o.is_sweep_override() and o.key_or_group not in schema.GROUPS and not o.is_add()]
    if not any(len(list_values(o)) > 1 for o in swept):
        return []
    try:
        base = pickle.dumps(compose(config_name, overrides=search_path + _first_job(overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return []  # _check_job says what is wrong
    problems: list[Problem] = []
    for override in swept:
        for text in list_values(override)[1:]:
            config = pickle.loads(base)
            value = OverridesParser.create().parse_override(f"{override.key_or_group}={text}").value()
            OmegaConf.update(config, override.key_or_group, value, merge=False)
            try:
                problems += check_settings(to_settings(config), hardware)
            except Refusal as refusal:
                problems += refusal.problems
    return problems


def _check_job(config_name: str, overrides: list[str], hardware: bool, folder: Path | None) -> list[Problem]:
    try:
        config = compose(config_name, overrides=overrides, return_hydra_config=True)
        _fill_in_hydra(config)
        settings = to_settings(config)
        problems = _check_overruled(config, config_name, overrides) + check_settings(settings, hardware)
        return problems + (check_folder(folder, settings) if folder else [])
    except Refusal as refusal:
        return refusal.problems
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        refusal = next((e for e in chain_of(error) if isinstance(e, Refusal)), None)
        if refusal:  # of a resolver
            return refusal.problems
        broken = _check_yaml(config_name, [o for o in overrides if o.startswith("hydra.searchpath=")])
        if broken:
            return broken  # whatever the overrides are
        message = _reason(error)
        full = f"{message} {getattr(error, 'full_key', '')}"
        named = [o for o in overrides if o.partition("=")[0].lstrip("+~") in full or o.partition("=")[2] in full]
        what = " ".join(named or overrides) or "conf/"
        return [Problem(what, message, "python train.py --cfg job   shows the settings without these overrides")]


def _fill_in_hydra(config: DictConfig) -> None:
    """Fill in Hydra's own part of `config` as Hydra will, and take it out; raises what that would raise, which Hydra shows as a
    traceback.
    """
    filled, hydra = HydraConfig.instance(), config.hydra
    before = filled.cfg
    with open_dict(config):
        hydra.job.num, hydra.job.id, hydra.runtime.output_dir = 0, "0", "outputs"  # known only once a job runs
        filled.set_config(config)
        try:
            OmegaConf.to_container(hydra, resolve=True)
        finally:
            filled.cfg = before
        del config["hydra"]


def _check_overruled(config: DictConfig, config_name: str, overrides: list[str]) -> list[Problem]:
    """Options chosen on the command line whose values an experiment, which comes last, sets otherwise."""
    pairs = [o.partition("=")[::2] for o in overrides]
    chosen = {key: value for key, value in pairs if key in schema.GROUPS and key != "experiment"}
    experiment = dict(pairs).get("experiment", "none")
    if experiment == "none" or not chosen:
        return []
    plain = compose(config_name, overrides=[o for o in overrides if not o.startswith("experiment=")])
    problems = []
    for group, option in chosen.items():
        got, meant = (OmegaConf.to_container(c[group], resolve=True, enum_to_str=True) for c in (config, plain))
        wrong = [key for key in meant if got[key] != meant[key]]
        if wrong:
            sets = ", ".join(f"{group}.{key}={got[key]}" for key in wrong)
            fix = " ".join(
                f"{group}.{key}={str(meant[key]).lower() if meant[key] in (True, False, None) else meant[key]}" for key in wrong
            )
            why = f"The experiment sets {sets}, over what {group}={option} brings."
            problems.append(Problem(f"experiment={experiment} {group}={option}", why, f"{fix}   to have the option's values"))
    return problems


def _reason(error: Exception) -> str:
    """An error's first line, the next one where it only announces that, and its cause's where it adds something."""
    lines = str(error).strip().splitlines()[: 2 if first_line(error).endswith(":") else 1]
    lines += [first_line(error.__cause__)] if error.__cause__ else []
    return " ".join(dict.fromkeys(lines))
