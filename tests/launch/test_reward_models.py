"""An alignment is another one when the reward model that it asks was trained anew."""

from pathlib import Path

from configs import storage
from configs.layout import RunLayout
from configs.load import load_recipe
from launch.stage_inputs import _reward_models


def test_the_reward_models_checkpoint_is_an_input_of_alignment(tmp_path: Path) -> None:
    reward = f"{{kind: model, run: {tmp_path}, tasks: {{like: 1.0}}}}"
    override = f"alignment={{kind: grpo, rule: null, rewards: [{reward}, {{kind: hit}}]}}"
    override = override.replace("rule: null", "rule: null, validation: null")
    recipe = load_recipe("quickstart", [override]).recipe
    found = [_reward_models(recipe)]
    for digest in ("a", "b"):
        record = {"outputs": {"checkpoint": {"url": "u", "hash": digest}}}
        storage.write_json(RunLayout(str(tmp_path)).stage_record("train"), record)
        found.append(_reward_models(recipe))
    assert found == [{"reward_models": {str(tmp_path): digest}} for digest in (None, "a", "b")]
    assert _reward_models(load_recipe("quickstart").recipe) == {}
