"""Read the command line before Hydra does, and refuse it with every problem in one message.

Hydra stops at the first mistake, exits with 1 and tells people to type `+` before a misspelt key, which walks past the
schema. Here each override is checked against the schema first, then each job is composed and its settings checked.
"""

import contextlib
import functools
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, version
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sft import console
from sft.cli.overrides import check_override, is_known, looks_secret, needs_sweep, one_line, parse_overrides, secret, takes_one
from sft.config import presets, schema
from sft.config.compose import PROCESSES, register, to_settings
from sft.config.consent import WORD
from sft.config.data_rules import why_lost
from sft.config.destinations import CODE, KEYS, check_destinations, destinations, own_code
from sft.config.keys import in_shell, typed
from sft.config.rules import check_settings
from sft.config.schema import Settings
from sft.data.prepare import check_small_files
from sft.distributed.group import is_first, launched
from sft.errors import Problem, Refusal, chain_of, first_line
from sft.paths import expanded
from sft.programs import by_name
from sft.runs.resume import check_folder, further, read_record, recorded_run, working_folder
from sft.storage.cache import cache_dir
from sft.sweep.checks import check_interval, check_means, is_search, runs_elsewhere, sweeper_params
from sft.sweep.grid import check_pairs, compose_job, each_value_once, list_values


def stop_on_refusal(config_dir: Path, argv: list[str] | None = None, hardware: bool = True) -> None:
    """Run `check_command_line`; on a refusal print it to stderr and exit with 2.

    `resume=<run folder>` in sys.argv becomes what Hydra needs to work in that folder; a number of processes, the word that
    allows a model's own code, destinations and files of rewards stay beside it. Of several processes that torchrun has
    started, one comes back from here: the others follow it.
    """
    if argv is None:
        _leave_to_first()
    try:
        check_command_line(config_dir, sys.argv[1:] if argv is None else argv, hardware)
        others = [w for w in sys.argv[1:] if w == WORD or w.startswith(PROCESSES) or w.partition("=")[0] in KEYS]
        words = [word for word in sys.argv[1:] if word not in others]
        if argv is None and len(words) == 1 and words[0].startswith("resume="):  # not beside --help
            folder = expanded(words[0].partition("=")[2]).resolve()
            place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
            sys.argv[1:] = [f"resume='{place}'", f"hydra.run.dir='{place}'", "hydra.output_subdir=null", *others]
    except Refusal as refusal:
        console.say_refusal(refusal)
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
    args = _parse_flags(config_dir, argv)
    if args.experimental_rerun:
        why = "It would run settings that were not checked, out of a pickle, which can run any code."
        fix = "resume=<a run's folder>   goes on with a run; its overrides are in run.json"
        raise Refusal([Problem(f"--experimental-rerun {args.experimental_rerun}", why, fix)])
    actions = [text for text in args.overrides if text.partition("=")[0] in ("install", "uninstall", "query")]
    if args.shell_completion and not (len(actions) == 1 and actions[0].partition("=")[2] in ("bash", "zsh", "fish")):
        why = "It needs one word, install or uninstall, with a shell: bash, zsh or fish."
        what = shlex.join(["--shell-completion", *actions])
        raise Refusal([Problem(what, why, "--shell-completion install=bash   or zsh, or fish")])
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    if args.multirun and args.cfg:
        raise Refusal([Problem(f"-m --cfg {args.cfg}", "--cfg shows one job, and -m asks for many.", "leave one of them out")])
    if any(text.startswith("resume=") for text in args.overrides):
        return _check_resume(argv, hardware)
    register()
    if left_aside := presets.left_aside():
        _warn_once(left_aside)
    problems: list[Problem] = []
    config_name = args.config_name or "config"
    with _hydra_over(config_dir, args):
        overrides = parse_overrides(args.overrides, problems)
        options = _group_options(config_name, overrides)
        for plain in [o for o in overrides if o.key_or_group in ("hydra.sweeper", "hydra.launcher") and not _is_table(o)]:
            fix = plain.key_or_group.replace(".", "/") + "=sft"
            problems.append(Problem(one_line(plain), f"{plain.key_or_group} holds several settings, not a single one.", fix))
            overrides.remove(plain)
        means = _sweep_means(config_name, overrides, bool(args.config_name or args.config_path))
        sweeping = bool(args.multirun) or (means is not None and means.mode == RunMode.MULTIRUN)
        preset = sweeper_params(means) if sweeping else []
        overrides = [o for o in parse_overrides(preset, problems) if o.key_or_group not in _keys(overrides)] + overrides
        hydras = [o for o in overrides if o.is_sweep_override() and o.key_or_group.startswith("hydra")]
        problems += [takes_one(o) for o in hydras]
        overrides = [o for o in overrides if o not in hydras]
        if not sweeping:
            swept = [o for o in overrides if o.is_sweep_override() and (o.key_or_group in options or is_known(o.key_or_group))]
            problems += [needs_sweep(o) for o in swept]
            overrides = [o for o in overrides if o not in swept]
        if not is_search(means):
            problems += [check_interval(o) for o in overrides if o.is_interval_sweep()]
            overrides = [o for o in overrides if not o.is_interval_sweep()]
        if args.cfg:
            why = "--cfg shows one job, and several values ask for many."
            swept = [o for o in parse_overrides(args.overrides, []) if o.is_sweep_override()] if sweeping else []
            problems += [Problem(one_line(o), why, f"{o.key_or_group}={list_values(o)[0]}") for o in swept]
        good = [o for o in overrides if check_override(o, options, problems)]
        trains = hardware and not args.cfg
        folder = None if sweeping or args.cfg else _run_folder(good)
        problems += _check_jobs(config_name, good, trains and not runs_elsewhere(means), folder)
        if trains:
            problems += check_means(means, good, sweeping) + _check_writable(folder or Path("outputs"))
        if sweeping and launched():
            why = "torchrun has started the processes of one run, and a sweep has many."
            fix = "python train.py -m distributed.num_processes=2 ...   starts them for each run of the sweep"
            problems.append(Problem("torchrun train.py -m", why, fix))
        if sweeping and any(o.key_or_group == "preflight.mode" and o.value() == "only" for o in good):
            why = "A sweep has many jobs, and the check alone is about one."
            problems.append(Problem("-m preflight.mode=only", why, "leave -m and the swept values out"))
    if problems:
        raise Refusal(list(dict.fromkeys(problems)))


@functools.cache
def _warn_once(text: str) -> None:
    console.say(text)


def read_settings(config_dir: Path, argv: list[str], hardware: bool = True) -> Settings:
    """The settings of the one job that `argv` describes, for commands other than train.py. Raises Refusal."""
    check_command_line(config_dir, argv, hardware)
    args = _parse_flags(config_dir, argv)
    if args.multirun:
        raise Refusal([Problem("-m", "A sweep has many jobs, and this command is about one.", "leave -m out")])
    if folders := [text.partition("=")[2] for text in args.overrides if text.startswith("resume=")]:
        return recorded_run(expanded(folders[0]), WORD in argv)[0]
    with _hydra_over(config_dir, args):
        return to_settings(compose(args.config_name or "config", overrides=args.overrides))


def _parse_flags(config_dir: Path, argv: list[str]) -> Any:
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
    main = _main_folder(config_dir, args) / f"{args.config_name or 'config'}.yaml"
    if args.config_path and not main.is_file():
        why = f"It would take the place of the project's own settings, and there is no {main}."
        problems.append(Problem(f"--config-path {args.config_path}", why, f"--config-dir {args.config_path}   adds to them"))
    elif args.config_path and by_name() and not os.path.isabs(args.config_path):
        why = "An installed command has no folder of its own that this could be relative to."
        fix = f"--config-path {shlex.quote(os.path.abspath(args.config_path))}"
        problems.append(Problem(f"--config-path {args.config_path}", why, fix))
    if args.config_dir and (why_lost(args.config_dir) or not Path(args.config_dir).is_dir()):
        fix = f"looked for {os.path.abspath(args.config_dir)}"
        problems.append(Problem(f"--config-dir {args.config_dir}", "There is no such folder.", fix))
    if problems:
        raise Refusal(problems)
    return args


@contextlib.contextmanager
def _hydra_over(config_dir: Path, args: Any) -> Iterator[None]:
    """Hydra over the folders that it will search for this command line, in its order."""
    search_path = create_config_search_path(str(_main_folder(config_dir, args)))
    if args.config_dir:
        added = f"file://{os.path.abspath(args.config_dir)}"
        search_path.prepend("command-line", added, SearchPathQuery(provider="schema"))
    before = get_gh_backup()
    version.setbase("1.3")
    Hydra.create_main_hydra2(task_name="train", config_search_path=search_path)
    try:
        yield
    finally:
        restore_gh_from_backup(before)


def _main_folder(config_dir: Path, args: Any) -> Path:
    """The folder of the primary config: `--config-path`, which is relative to train.py, or the project's own."""
    return config_dir.resolve().parent / args.config_path if args.config_path else config_dir.resolve()


def _check_yaml(config_name: str, search_path: list[str]) -> list[Problem]:
    """A broken or missing YAML file, found without any override."""
    try:
        compose(config_name, overrides=search_path)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        sources = _repository(config_name, search_path).get_sources()
        folders = [Path(source.path) for source in sources if source.scheme() == "file"]
        name = config_name.removesuffix(".yaml") + ".yaml"
        place = next((os.path.relpath(folder / name) for folder in folders if (folder / name).is_file()), name)
        fix = "mend the file, or take it back from git"
        if config_name != "config":
            fix = "a primary config begins with   defaults: [config, _self_]\n"
            fix += "--config-name is rarely needed: presets are chosen with experiment=..."
        looked = "" if place != name else f" Looked in {', '.join(map(os.path.relpath, folders))}."
        return [Problem(place, f"It cannot be composed. {_reason(error)}{looked}", fix)]
    return []


def _repository(config_name: str, overrides: list[str]) -> IConfigRepository:
    """What Hydra reads configs from: the folders on its search path, with those that `hydra.searchpath` adds."""
    make = GlobalHydra.instance().config_loader()._parse_overrides_and_create_caching_repo
    try:
        return make(config_name, overrides)[1]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return make(None, [])[1]  # composing says what is wrong


def _group_options(config_name: str, overrides: list[Override]) -> dict[str, list[str]]:
    """The options of each group, also of one's own, in every folder that Hydra searches; those of subfolders as `team/faq`."""
    repository = _repository(config_name, [o.input_line for o in overrides if o.key_or_group == "hydra.searchpath"])
    options = {
        group: sorted(_options_below(repository, group)) for group in (*schema.GROUPS, "hydra/launcher", "hydra/sweeper")
    }
    own = [g for g in repository.get_group_options("", ObjectType.GROUP) if g not in (*schema.GROUPS, "hydra", "hydra_plugins")]
    return options | {group: sorted(found) for group in own if (found := _options_below(repository, group))}


def _options_below(repository: IConfigRepository, group: str) -> list[str]:
    options = repository.get_group_options(group, ObjectType.CONFIG)
    for inner in repository.get_group_options(group, ObjectType.GROUP):
        options += [f"{inner}/{option}" for option in _options_below(repository, f"{group}/{inner}")]
    return options


def _is_table(override: Override) -> bool:
    return isinstance(override._value, dict)


def _keys(overrides: list[Override]) -> set[str]:
    return {o.key_or_group for o in overrides}


def _sweep_means(config_name: str, overrides: list[Override], own: bool) -> DictConfig | None:
    """What was chosen of `sweep`, `experiment` and Hydra's own settings, composed; None where nothing was, or it cannot be.

    `own` says that the primary config is one of the user's, which may choose as well.
    """
    chosen = [o for o in overrides if o.key_or_group in ("sweep", "experiment") or o.key_or_group.startswith("hydra")]
    if not (chosen or own):
        return None
    lines = [o.input_line for o in chosen if not o.is_sweep_override()]
    try:
        return compose(config_name, overrides=lines, return_hydra_config=True).hydra
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None  # the checks below say what is wrong


def _run_folder(overrides: list[Override]) -> Path | None:
    """The folder that `hydra.run.dir` names, where it is known before Hydra fills it in."""
    named = [o.value() for o in overrides if o.key_or_group == "hydra.run.dir"]
    return Path(os.path.expanduser(named[-1])) if named and isinstance(named[-1], str) and "${" not in named[-1] else None


def _check_writable(folder: Path) -> list[Problem]:
    """The problems of a run folder and of the cache folder if they cannot be written. Leaves no trace."""
    problems = []
    if why := why_unwritable(folder):
        problems.append(Problem(f"hydra.run.dir={folder}", why, "hydra.run.dir=<a folder that can be written>"))
    try:
        cache = cache_dir()
    except RuntimeError:  # no home folder, as in some containers
        why, cache = "There is no home folder for it.", "~/.cache/sft"
    else:
        why = why_unwritable(cache)
    if why:
        problems.append(
            Problem(f"the cache folder {cache}", why, "SFT_CACHE=<a folder that can be written> python train.py ...")
        )
    return problems


def why_unwritable(folder: Path) -> str:
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
        place = expanded(text.partition("=")[2])
        before = read_record(place) if text.partition("=")[2] and not why_lost(text.partition("=")[2]) else None
        if before and before.get("status") == "finished":  # alone it would be refused as well
            raise Refusal([Problem(shlex.join(argv), "This run is finished.", further(place, before, others))])
        raise Refusal([Problem(shlex.join(argv), why, f"{shlex.quote(text)}   alone")])
    folder = text.partition("=")[2]
    if folder in ("", "null"):
        raise Refusal([Problem(text, "It names no folder.", "resume=outputs/<run>")])
    if lost := why_lost(folder):
        raise Refusal([Problem(text.replace("\n", "\\n"), lost, "resume=outputs/<run>")])
    place = expanded(folder).resolve()
    settings, record = recorded_run(place, WORD in argv, counts[-1].removeprefix(PROCESSES) if counts else None)
    goes_to = [f"{key}={value}" for key, value in destinations(settings).items()]
    others = [word for word in sent if word not in goes_to]
    problems = check_destinations(settings, record, sent, shlex.quote(text))
    code = [f"{key}={value}" for key, value in own_code(settings).items()]
    if beside := [word for word in others if word.partition("=")[0] in CODE]:
        others = [word for word in others if word not in beside]
        if not set(beside) <= set(code):
            why = f"A run goes on with its own settings, so that {shlex.join(beside)} would be ignored."
            problems.append(Problem(shlex.join(argv), why, f"{shlex.quote(text)}   alone"))
    if others:
        named = " and ".join(goes_to) or "nobody"
        why = f"The run sends what it makes to {named}, so that {shlex.join(others)} would be ignored."
        problems.append(Problem(shlex.join(argv), why, f"{shlex.quote(text)}   alone"))
    with working_folder(record, place):
        problems += check_settings(settings, hardware) + _check_writable(place)
    if problems:
        raise Refusal(problems)


def _check_jobs(config_name: str, overrides: list[Override], hardware: bool, folder: Path | None) -> list[Problem]:
    """Problems of the one job, or of a sweep's first one and of one more for each further value, and of `sweep.paired`.

    Only what decides which files are read is composed anew: one composition for each value would take minutes.
    """
    composed: dict[tuple, bytes] = {}
    counts = {o.key_or_group: len(list_values(o)) for o in overrides if o.is_sweep_override()}
    problems, paired = _check_job(config_name, each_value_once(overrides, [])[0], hardware, folder, composed)
    problems += (wrong := check_pairs(paired, counts) if counts and paired else [])
    for job in each_value_once(overrides, [] if wrong else paired)[1:]:
        problems += _check_job(config_name, job, hardware, None, composed)[0]
    return problems


def _check_job(
    config_name: str, overrides: list[str], hardware: bool, folder: Path | None, composed: dict[tuple, bytes]
) -> tuple[list[Problem], list[str]]:
    """(problems, `sweep.paired`) of one job. `composed` holds the jobs so far, as in `compose_job`."""

    def make(lines: list[str]) -> DictConfig:
        return compose(config_name, overrides=lines, return_hydra_config=True)

    try:
        before = len(composed)
        config = compose_job(make, overrides, composed)
        anew = len(composed) > before
        if anew:
            _fill_in_hydra(config)
        with open_dict(config):
            del config["hydra"]
        settings = to_settings(config)
        problems = (_check_overruled(config, config_name, overrides) if anew else []) + check_settings(settings, hardware)
        problems += check_folder(folder, settings) if folder else []
        if hardware and anew and not problems:
            check_small_files(settings)
        return problems, list(settings.sweep.paired)
    except Refusal as refusal:
        return refusal.problems, []
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        refusal = next((e for e in chain_of(error) if isinstance(e, Refusal)), None)
        if refusal:  # of a resolver
            return refusal.problems, []
        broken = _check_yaml(config_name, [o for o in overrides if o.startswith("hydra.searchpath=")])
        if broken:
            return broken, []  # whatever the overrides are
        message = _reason(error)
        full = f"{message} {getattr(error, 'full_key', '')}"
        named = [o for o in overrides if o.partition("=")[0].lstrip("+~") in full or o.partition("=")[2] in full]
        what = " ".join(named or overrides) or "conf/"
        return [Problem(what, message, "python train.py --cfg job   shows the settings without these overrides")], []


def _fill_in_hydra(config: DictConfig) -> None:
    """Fill in Hydra's own part of `config` as Hydra will; raises what that would raise, which Hydra shows as a traceback."""
    filled, hydra = HydraConfig.instance(), config.hydra
    before = filled.cfg
    with open_dict(config):
        hydra.job.num, hydra.job.id, hydra.runtime.output_dir = 0, "0", "outputs"  # known only once a job runs
        filled.set_config(config)
        try:
            OmegaConf.to_container(hydra, resolve=True)
        finally:
            filled.cfg = before


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
            fix = " ".join(typed(f"{group}.{key}", meant[key]) for key in wrong)
            why = f"The experiment sets {sets}, over what {group}={option} brings."
            problems.append(Problem(f"experiment={experiment} {group}={option}", why, f"{fix}   to have the option's values"))
    return problems


def _reason(error: Exception) -> str:
    """An error's first line, the next one where it only announces that, and its cause's where it adds something."""
    lines = str(error).strip().splitlines()[: 2 if first_line(error).endswith(":") else 1]
    lines += [first_line(error.__cause__)] if error.__cause__ else []
    return " ".join(dict.fromkeys(lines))
