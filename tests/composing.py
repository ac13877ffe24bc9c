"""Hydra reads the project's own files a thousand times in the tests: what depends on them alone is made once in a process.

That is the list of files that the chosen groups name, the config that they make before an override sets a value in it, what
the texts in it mean, and what stands in the project's own `conf/`. The first two are kept as bytes, so that each command line
has a copy of its own, and by the time and the size of each file. What raises raises each time.
"""

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from omegaconf import _utils, base, grammar_parser
from omegaconf.resolvers import oc

from sft.paths import CONF

MOST = 300
"""Files and folders below one that is searched; of more nothing is kept."""

_kept: dict[bytes, bytes] = {}


def _files_below(folder: str) -> Iterator[tuple[str, int, int]]:
    for entry in os.scandir(folder):
        facts = entry.stat(follow_symlinks=False)
        yield entry.path, facts.st_mtime_ns, facts.st_size
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(entry.path)


def _state_of(source: Any) -> tuple:
    """Where a source looks, and the files that it finds there."""
    place = os.path.realpath(source.path) if source.scheme() == "file" else source.path
    found = _files_below(place) if source.scheme() == "file" and os.path.isdir(place) else ()
    return source.scheme(), place, source.provider, sorted(itertools.islice(found, MOST + 1))


def _keep(repo: Any, words: tuple, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for the same words and the same files."""
    states = [_state_of(source) for source in repo.get_sources()]
    if any(len(files) > MOST for *_, files in states):
        return make()
    key = pickle.dumps((states, words))
    if key not in _kept:
        _kept[key] = pickle.dumps(make())
    return pickle.loads(_kept[key])


def _list_files(repo, config_name, overrides, prepend_hydra, skip_missing, real=defaults_list._create_defaults_list):
    """As Hydra's own, which notes in `overrides` what it chose."""
    values, words = overrides.config_overrides, {**vars(overrides), "config_overrides": []}

    def make() -> tuple:
        found = real(repo, config_name, overrides, prepend_hydra, skip_missing)
        return found, {**vars(overrides), "config_overrides": []}

    found, notes = _keep(repo, (config_name, prepend_hydra, skip_missing, words), make)
    vars(overrides).update(notes, config_overrides=values)
    return found


def _read_files(loader, defaults, repo, real=ConfigLoaderImpl._compose_config_from_defaults_list):
    return _keep(repo, ([vars(default) for default in defaults],), lambda: real(loader, defaults, repo))


def _list_once(real: Callable) -> Callable:
    """As `list` of Hydra's files; of the project's own folder once, where no test writes."""
    found: dict[tuple, list[str]] = {}

    def listed(source, config_path, results_filter) -> list[str]:
        if source.path != str(CONF):
            return real(source, config_path, results_filter)
        if (config_path, results_filter) not in found:
            found[config_path, results_filter] = real(source, config_path, results_filter)
        return [*found[config_path, results_filter]]

    return listed


def install() -> None:
    """Put these in the place of Hydra's and OmegaConf's own."""
    defaults_list._create_defaults_list = _list_files
    ConfigLoaderImpl._compose_config_from_defaults_list = _read_files
    Plugins.instance()
    files = SourcesRegistry.instance().resolve("file")
    files.list = _list_once(files.list)
    for module in (_utils, base, oc):
        module.parse = functools.cache(grammar_parser.parse)
