"""Shared fixture of the inference tests: a workdir with the tiny model."""

import pytest

from tests.inference.models import save_workdir


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("work"))
