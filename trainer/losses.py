"""The recipe's pretraining loss over the recipe's model."""

from configs.objectives import NextCodeConfig
from models.generation.catalogue_trie import CatalogueTrie
from trainer.objectives.next_code import NextCodeLoss
from trainer.objectives.next_item import NextItemLoss
from trainer.policy import Worker, build_code_decoder, build_sequence_model


def pretraining_loss(worker: Worker) -> NextItemLoss | NextCodeLoss:
    """What pretraining minimises, with a new model. Evaluation builds the same to load into."""
    objective = worker.recipe.objective
    if not isinstance(objective, NextCodeConfig):
        return NextItemLoss(build_sequence_model(worker), objective, worker.num_items)
    codes = worker.semantic_ids
    assert codes is not None, "a recipe that writes codes has a tokenizer"
    trie = None
    if objective.normalization == "catalogue":
        trie = CatalogueTrie.build(codes.codes[1:], codes.codebook_sizes).to(worker.ctx.device)
    return NextCodeLoss(build_code_decoder(worker), objective, trie)
