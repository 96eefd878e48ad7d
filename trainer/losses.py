"""The recipe's pretraining loss over the recipe's model."""

from configs.objectives import MultiTaskConfig, NextCodeConfig
from trainer.objectives.next_code import NextCodeLoss
from trainer.objectives.next_item import NextItemLoss
from trainer.policy import Worker, build_code_decoder, build_sequence_model


def pretraining_loss(worker: Worker) -> NextItemLoss | NextCodeLoss:
    """What pretraining minimises, with a new model. Evaluation builds the same to load into."""
    objective = worker.recipe.objective
    assert not isinstance(objective, MultiTaskConfig), "a recipe's checks tell ranking models apart"
    if not isinstance(objective, NextCodeConfig):
        return NextItemLoss(build_sequence_model(worker), objective, worker.num_items)
    trie = worker.catalogue.trie if objective.normalization == "catalogue" else None
    return NextCodeLoss(build_code_decoder(worker), objective, trie)
