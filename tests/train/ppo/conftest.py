from pathlib import Path

import pytest
import torch

from tests.support.ppo_models import save_models


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """One thread, no telemetry, no network."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # no telemetry
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folders `base` (a policy), `reward` (a classifier), and a policy per other architecture."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder
