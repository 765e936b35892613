"""The methods that ship with kdbench are found and importable however kdbench is installed."""

import importlib
import sys

import pytest
from conftest import METHODS

import kdbench.methods
from kdbench.discovery import find_methods


def test_methods_are_imported_by_class_and_by_module():
    for entry in find_methods(["all"]):
        assert getattr(kdbench.methods, entry.method.__name__) is entry.method
        module = importlib.import_module(f"kdbench.methods.{entry.name}")
        assert getattr(module, entry.method.__name__) is entry.method
    with pytest.raises(ImportError, match="NoSuchMethod"):
        exec("from kdbench.methods import NoSuchMethod")


def test_a_users_own_folders_named_methods_and_suites_change_nothing(tmp_path, monkeypatch):
    for name in ("methods", "suites"):
        package = tmp_path / name / "__init__.py"
        package.parent.mkdir()
        package.write_text("raise ImportError('the user\\'s own package was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("kdbench.methods.")]:
        monkeypatch.delitem(sys.modules, name)
    assert [entry.name for entry in find_methods(["all"])] == METHODS
