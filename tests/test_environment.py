"""Garbage is searched for where it pays: not while libraries are imported, and not when the program ends."""

import gc
import subprocess
import sys

import pytest

from sft.environment import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_off_while_libraries_are_imported_and_as_before_after_it(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), importing():
            with importing():
                pass
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_program_that_ends_does_not_search_what_it_has_for_garbage():
    circle = "import sys; c = sys.modules['c'] = type('C', (), {'__del__': lambda self: print('searched')})(); c.c = c; del c"
    for first, said in (("", "searched\n"), ("import sft.environment; ", "")):
        code = f"{first}{circle}; del sys.modules['c']"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == said, first
