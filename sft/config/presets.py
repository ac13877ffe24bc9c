"""Presets of the user's own: `conf/` of the current folder, found by itself."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

from sft.paths import CONF


class OwnPresets(SearchPathPlugin):
    """Puts that folder before the project's own. Registered by this project's programs alone, not for all of Hydra."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """What Hydra calls where it makes the list of folders that it searches."""
        folder = Path.cwd() / "conf"
        if _is_of_the_user(folder) and not left_aside():
            search_path.prepend("own", f"file://{folder}", SearchPathQuery(provider="main"))


def left_aside() -> str:
    """Why `conf/` of the current folder is not searched, as a warning with its hint; else an empty text."""
    folder = Path.cwd() / "conf"
    if not (_is_of_the_user(folder) and (folder / "config.yaml").is_file()):
        return ""
    why = "its config.yaml would take the place of the project's own settings"
    return f"warning: {folder} is left aside: {why}\nhint: --config-dir conf   adds what else is in it"


def _is_of_the_user(folder: Path) -> bool:
    return folder.is_dir() and folder.resolve() != CONF.resolve()
