"""What a recipe of offline alignment says by default."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.alignment import DPOConfig, SoftmaxDPOConfig

OWN = {"kind": "labels", "liked": ["like"], "disliked": ["hate"]}


@pytest.mark.parametrize("rule", [{}, {"rule": OWN}, {"rule": {"kind": "rating"}}])
def test_s_dpo_has_several_losers_whatever_the_rule(rule: dict[str, Any]) -> None:
    config = SoftmaxDPOConfig.model_validate(rule)
    assert config.rule.rejected_per_chosen == 3
    assert SoftmaxDPOConfig.model_validate(config.model_dump(mode="json")) == config
    assert DPOConfig.model_validate(rule).rule.rejected_per_chosen == 1


def test_s_dpo_with_one_loser_is_refused() -> None:
    two = SoftmaxDPOConfig.model_validate({"rule": OWN | {"rejected_per_chosen": 2}})
    assert two.rule.rejected_per_chosen == 2
    with pytest.raises(ValidationError, match="rejected_per_chosen=1 makes s_dpo what dpo is"):
        SoftmaxDPOConfig.model_validate({"rule": OWN | {"rejected_per_chosen": 1}})
