"""The folder of a run after accidents: what a start makes of what it finds there."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import pytest
from run_worker import tiny

from jaxllm import config as configuration
from jaxllm.config import RunConfig
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.metrics import append_jsonl
from jaxllm.train.run_folder import RunFolder, decide


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return tiny(str(tmp_path / "run"), "", steps=12)


@pytest.fixture
def folder(config) -> RunFolder:
    """A run that was killed at step 9, with the steps 4 and 8 saved."""
    folder = RunFolder(config.out)
    folder.create()
    folder.config.write_text(configuration.to_json(config))
    checkpoints = Checkpoints(folder.checkpoints)
    for step in (4, 8):
        meta = {"config": asdict(config)}
        checkpoints.save(step, {"step": jnp.int32(step)}, meta)
    checkpoints.close()
    append_jsonl(folder.metrics, [{"step": s, "loss": 1.0} for s in range(9)])
    folder.log.write_text("what was said")
    return folder


def finish(folder: RunFolder, step: int) -> None:
    folder.summary.write_text(json.dumps({"finished": True, "step": step}))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"modle": {}}', "\xff"])
def test_a_lost_config_is_that_of_the_newest_checkpoint(folder, config, content):
    folder.config.unlink()
    if content is not None:
        folder.config.write_bytes(content.encode("latin-1"))
    assert folder.load_config() == config
    assert decide(folder, config) == "continue"
    other = replace(config, train=replace(config.train, seed=1))
    with pytest.raises(ValueError, match="train.seed=0, and train.seed=1"):
        decide(folder, other)


def test_a_flipped_bit_in_the_config_refuses_nothing(folder, config):
    text = folder.config.read_text()
    assert '"dim": 128' in text
    folder.config.write_text(text.replace('"dim": 128', '"dim": 120'))
    assert decide(folder, config) == "continue"
    other = replace(config, optim=replace(config.optim, learning_rate=0.5))
    with pytest.raises(ValueError, match="holds a run with"):
        decide(folder, other)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("how", ["deleted", "emptied", "a disk that is not mounted"])
def test_checkpoints_that_are_gone_start_nothing_anew(folder, config, how, resume):
    shutil.rmtree(folder.checkpoints)
    if how == "emptied":
        folder.checkpoints.mkdir()
    elif how != "deleted":
        folder.checkpoints.symlink_to("/not/mounted/checkpoints")
    with pytest.raises(ValueError, match="its checkpoints are gone from") as caught:
        decide(folder, replace(config, resume=resume))
    assert "is their disk mounted?" in str(caught.value)
    assert decide(folder, replace(config, fresh=True)) == "new"


def test_a_run_that_died_before_its_first_checkpoint_begins_again(folder, config):
    shutil.rmtree(folder.checkpoints)
    folder.metrics.unlink()
    assert decide(folder, config) == "new"


@pytest.mark.parametrize("deaths", [[0], [1], [2], [3], [1, 0, 1]])
def test_setting_aside_that_dies_is_finished_by_the_next(folder, config, deaths):
    """By any start, though it is not told to be fresh: half a run is none."""
    finish(folder, 12)
    (folder.path / "data").mkdir()
    names = {p.name for p in folder.path.iterdir()} - {"data"}

    class Death(BaseException):
        pass

    true_rename, left = Path.rename, []

    def rename(self, target):
        if not left:
            raise Death
        left.pop()
        return true_rename(self, target)

    asked = replace(config, fresh=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        for count in deaths:
            left[:] = [None] * count
            assert decide(folder, asked) == "new"
            with pytest.raises(Death):
                folder.set_aside()
            asked = config
    assert decide(folder, config) == "new"
    with pytest.raises(ValueError, match="is being set aside in its archive"):
        decide(folder, replace(config, resume=True))
    aside = folder.set_aside()
    assert aside == folder.path / "archive" / "1"
    assert {p.name for p in aside.iterdir()} == names
    assert {p.name for p in folder.path.iterdir()} == {"data", "archive"}
    assert Checkpoints(aside / "checkpoints").steps() == [4, 8]
    assert folder.set_aside() is None


def test_a_run_without_its_config_is_set_aside_too(folder, config):
    folder.config.unlink()
    aside = folder.set_aside()
    assert aside is not None
    assert Checkpoints(aside / "checkpoints").steps() == [4, 8]
    assert decide(folder, config) == "new"


def longer(config: RunConfig, **changes) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def test_a_finished_run_goes_on_when_it_is_made_longer(folder, config):
    finish(folder, 12)
    assert decide(folder, config) == "finished"
    assert decide(folder, longer(config, steps=11)) == "finished"
    # Also after a death between the new configuration and the old summary's removal.
    more = longer(config, steps=16)
    for _ in range(2):
        assert decide(folder, more) == "continue"
        folder.config.write_text(configuration.to_json(more))


def test_epochs_make_a_run_longer_too(folder, config):
    by_epochs = longer(config, steps=0, epochs=1)
    folder.config.write_text(configuration.to_json(by_epochs))
    finish(folder, 12)
    for resume in (False, True):
        one = replace(by_epochs, resume=resume)
        assert decide(folder, one) == "finished"
        assert decide(folder, longer(one, epochs=2)) == "continue"
