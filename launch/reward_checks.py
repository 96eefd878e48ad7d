"""What a recipe's rewards name outside the recipe is looked at before anything runs."""

from configs.alignment import rewards_of
from configs.recipe import Recipe
from configs.rewards import FunctionReward, ModelReward
from launch.stage_inputs import trained_checkpoint


def check_functions(recipe: Recipe) -> None:
    """Import what the recipe names by dotted path.

    Raises:
        ValueError: it cannot be imported, or takes other arguments.
    """
    rewards = rewards_of(recipe.alignment)
    paths = [each.path for each in rewards if isinstance(each, FunctionReward)]
    if paths:
        from trainer.rewards.user_function import load_function

        for path in paths:
            load_function(path)


def check_models(recipe: Recipe) -> None:
    """Find the reward models that alignment will ask.

    Raises:
        ValueError: names the key whose run has no finished training.
    """
    for at, each in enumerate(rewards_of(recipe.alignment)):
        if isinstance(each, ModelReward):
            trained_checkpoint(each.run, f"alignment.rewards.{at}.run")
