"""Shared fixtures of chat and server: a workdir with the tiny model, and the address of its server."""

import pytest

from tests.inference.models import save_workdir


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def address():
    from tests.apps.servers import running

    with running("--max-pixels=10000", "--max-body=200000") as address:
        yield address
