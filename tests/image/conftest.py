"""The image is built once, by the worker that runs the group; tests marked `root` run in an enclosure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dataplane.conftest import backend, kernel, pytest_pyfunc_call
from tests.image.built import DEBIAN, Image, build
from tests.image.container import Containers

__all__ = ["backend", "kernel", "pytest_pyfunc_call"]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if not DEBIAN:
        pytest.skip("needs apt-get and dpkg-deb: the image is made of Debian packages")
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture
def containers(image: Image, tmp_path: Path) -> Containers:
    return Containers(image.root, image.description["config"], tmp_path)
